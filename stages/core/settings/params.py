"""params.yaml as checked, typed values. Every key is known, every value has its type; anything else is one line."""

import math
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from stages.core.runtime.errors import InputError, shown, some
from stages.core.settings.places import BUCKET, BUCKET_RULE, OWN, endpoint_fault
from stages.core.settings.profiles import Place, Profile
from stages.core.settings.sections import Count, Name, Section, Whole
from stages.core.settings.yaml_text import read_yaml

PROFILE_FILES = ("params.yaml", "published.yaml")


Raw = dict[str, Any]


def _check_bucket(name: str) -> str:
    if not re.fullmatch(BUCKET, name) or re.search(r"\.\.|\.-|-\.|^[0-9.]+$|^xn--", name):
        raise ValueError(f"found {shown(name)}; allowed: {BUCKET_RULE}")
    return name


def _check_endpoint(address: str) -> str:
    if fault := endpoint_fault(address):
        raise ValueError(fault)
    return address


BucketName = Annotated[str, AfterValidator(_check_bucket)]
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]


class ArtifactsSection(Section):
    """The artifact bucket; ``cache`` null means the user's cache folder."""

    bucket: BucketName
    prefix: str = ""
    endpoint: Endpoint | None = None
    region: str = "us-east-1"
    anonymous: bool = True
    cache: str | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 5.0  # seconds without an answer
    sha256: dict[Place, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}  # noqa: RUF012 (pydantic copies it)


class FinetuneSection(Section):
    workers: Count = 2  # networks trained side by side, one thread each
    mixed_precision: Literal["auto"] | bool = "auto"

    def mixed_precision_on(self, device: str) -> bool:
        """Whether to compute in bfloat16 on a device of this type: ``auto`` says on a GPU."""
        return device != "cpu" if self.mixed_precision == "auto" else bool(self.mixed_precision)


class Params(Section):
    """The whole of params.yaml."""

    profile: Name
    profiles_from: Literal["params.yaml", "published.yaml"] = "params.yaml"
    source: Literal["embedded", "s3", "local"]
    own: str = str(OWN)  # the folder that `source: local` takes files from
    budget: Annotated[float, Field(allow_inf_nan=False)]
    seed: Whole
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    threads: Count
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1  # processes that share the images
    artifacts: ArtifactsSection
    finetune: FinetuneSection
    # checked by stages.core.recipe, so that a new way of merging retrains no network
    statistics: Raw
    match: dict[Name, Raw]
    allocate: Raw
    fit: Raw
    recalibrate: Raw
    probe: Raw
    methods: dict[Name, Raw]
    full: dict[Name, Raw] = Field(default_factory=dict)
    profiles: dict[Name, Profile]

    @property
    def active(self) -> Profile:
        return self.profiles[self.profile]

    @model_validator(mode="after")
    def _check(self) -> "Params":
        if self.own != str(OWN) and not Path(self.own).is_absolute():
            raise ValueError(f"own: found {self.own!r}; allowed: {OWN}, or a folder by its absolute path")
        if self.profile not in self.profiles:
            raise ValueError(
                f"profile: found {self.profile!r}; allowed: {nearest(self.profile, self.profiles)}"
            )
        most = len(self.active.tasks)
        if self.allocate.get("layout") == "dense":  # where everything separate costs up to N^2
            most **= 2
        if not 1.0 <= self.budget <= most:
            raise ValueError(f"budget: found {self.budget:g}; allowed: a number from 1 to {most}")
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises InputError in one line: the key, what was found and what is allowed.
    """
    found = read_yaml(Path(path))
    other = found.get("profiles_from") if isinstance(found, dict) else None
    if other in PROFILE_FILES[1:] and isinstance(found.get("profiles"), dict):
        found["profiles"] |= _profiles_of(Path(path).with_name(other))
    return parse_params(found, str(path))


def _profiles_of(path: Path) -> dict[str, Any]:
    """Those of a file, unchecked. Raises InputError where it has none."""
    found = read_yaml(path)
    profiles = found.get("profiles") if isinstance(found, dict) else None
    if not isinstance(profiles, dict):
        raise InputError(f"{path}: profiles: found {type(profiles).__name__}; allowed: a mapping of profiles")
    return profiles


def nearest(name: str, names: Collection[str], count: int = 5) -> str:
    """The names for an error message: all where they are few, else those most like ``name`` and how many more."""
    if len(names) <= count:
        return ", ".join(names)
    found = get_close_matches(name, names, count, cutoff=0.0)
    return f"{', '.join(found)}, and {len(names) - count} more"


class ProfilesAlone(Section):
    """What is read of a file of which nothing else is asked."""

    profiles: dict[str, Profile]


def profiles_by_file(folder: str | Path = ".") -> dict[str, dict[str, Profile]]:
    """The profiles of every file that has some. Raises InputError in one line, as ``load_params`` does."""
    found = {}
    for name in PROFILE_FILES:
        path = Path(folder) / name
        if path.is_file():
            try:
                found[name] = ProfilesAlone(profiles=_profiles_of(path)).profiles
            except ValidationError as error:
                raise InputError(f"{path}: {first_line(error, ProfilesAlone)}") from error
    return found


def parse_params(found: Any, path: str = "params.yaml") -> Params:
    """Check an already read mapping (what ``load_params`` does after reading)."""
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {shown(found)}; allowed: a mapping of settings, as it is committed")
    if isinstance(found.get("budget"), int) and not isinstance(found["budget"], bool):
        found = {**found, "budget": float(found["budget"])}
    try:
        return Params.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def section_of(params: Params, name: str, section: type[Section], path: str = "params.yaml") -> Section:
    """One raw section, checked: for a stage that depends on no other. Raises InputError in one line."""
    try:
        return section.model_validate(getattr(params, name))
    except ValidationError as error:
        raise InputError(f"{path}: {first_line(error, section, name)}") from error


def first_line(error: ValidationError, section: type[Section] = Params, name: str = "") -> str:
    """One line: the key (below ``name``), what was found and what is allowed."""
    first, *others = error.errors()
    location, kinds = first["loc"], [first]
    kinds += [
        own
        for own in others
        if own["loc"][:-1] == location[:-1] and own["input"] is first["input"] and first["type"] != "missing"
    ]
    if len(kinds) > 1:  # a value of several kinds: each of them has said why it is not that one
        location = location[:-1]
    where = ".".join(str(part) for part in (name, *location) if part != "")
    kind = first["type"]
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{where}: {message}" if where else message
    if kind == "missing":
        return f"{where}: not there; allowed: a value for it"
    if kind == "extra_forbidden":
        return f"{where}: unknown key; allowed: {', '.join(_siblings(section, first['loc']))}"
    allowed = " or ".join(dict.fromkeys(map(_allowed, kinds)))
    if kind == "model_type" and len(kinds) == 1:
        allowed += f" of {some(_siblings(section, (*first['loc'], '')), 8)}"
    value = first["input"]
    found = "nan" if isinstance(value, float) and math.isnan(value) else shown(value)
    return f"{where}: found {found} ({type(value).__name__}); allowed: {allowed}"


def _allowed(kind: Mapping[str, Any]) -> str:
    if kind["type"] in ("model_type", "dict_type"):
        return "a mapping"
    return kind["msg"].removeprefix("Input should be ").removeprefix("a valid ")


def _siblings(section: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Names of the keys allowed beside the unknown key at ``location``."""
    annotation: Any = section
    for part in location[:-1]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[part].annotation
        else:  # dict[Name, Section]: the part is a name of the user's choice
            annotation = annotation.__args__[-1]
        if isinstance(annotation, UnionType):  # a section or null
            annotation = next(each for each in annotation.__args__ if each is not type(None))
    return list(annotation.model_fields)
