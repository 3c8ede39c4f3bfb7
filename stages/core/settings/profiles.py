"""What a profile of params.yaml says: an architecture, and tasks with their checkpoints and images."""

from collections import Counter
from itertools import zip_longest
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from stages.core.runtime.errors import some
from stages.core.settings import places
from stages.core.settings.datasets import Domain, Kind, View
from stages.core.settings.sections import (
    MOST,
    Count,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Section,
    Shift,
    Whole,
)

Constructor = Annotated[
    str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.:-]*$")
]  # a name, or package.module:function
Place = Annotated[str, Field(pattern=places.PATTERN)]  # a key, an s3:// URL or a path


Side = Annotated[int, Field(ge=8, le=2**15)]  # pixels
Finite = Annotated[float, Field(ge=-1e6, le=1e6)]  # of pixels from 0 to 1
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]


def _no_bool(found: Any) -> Any:
    """True equals 1, but is no number of channels."""
    if isinstance(found, bool):
        raise ValueError(f"found {found} (bool); allowed: 1 or 3")
    return found


def _check_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Refuse whole numbers of a constructor's arguments that no size or count can be."""
    for key, value in found.items():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, int) and abs(entry) > MOST:
                raise ValueError(f"{key}: found a whole number beyond {MOST}; allowed: none larger")
    return found


class Limits(Section):
    """What a data set may cost at most, checked before and while it is read.

    ``pixels`` of one image, by its header; null: four times what is asked for, or 50 million where that is more.
    ``entries`` of its archives, those inside them counted too; null: 20,000, and one for every 200 bytes. ``unfold``:
    unpacked bytes per byte of its files, beyond the first 256 MiB.
    """

    pixels: Count | None = None
    entries: Count | None = None
    unfold: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 50.0


class Data(Section):
    """Where a task's images come from.

    ``key``: its archive, by its name in the artifact store, or from anywhere (settings.places). ``also``: further
    files of the same data set, where it comes in several. ``classes``: the ones to use, in this order; else all,
    numbered by the data set or sorted by name.
    """

    kind: Kind
    key: Place
    also: list[Place] = Field([])
    domain: Domain | None = None  # of DomainNet
    size: Side
    resize: Side | None = None  # shorter side before the centre is cut out; null: size
    channels: Annotated[Literal[1, 3], BeforeValidator(_no_bool)] = 3
    view: View = "upright"
    classes: list[str] | None = None
    order: Literal["official", "name"] = "official"
    label_space: Count | None = None  # labels are the data set's own class numbers, from 0 to this (excluded)
    calibration: Fraction = 0.25  # share of each class's train images set aside, used without labels
    mean: list[Finite] = Field([0.5])
    std: list[Scale] = Field([0.5])
    limits: Limits = Field(Limits())

    @property
    def places(self) -> list[str]:
        """Where its files come from."""
        return [self.key, *self.also]

    @model_validator(mode="after")
    def _check(self) -> "Data":
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(
                    f"{name} needs 1 or {self.channels} numbers, found {len(getattr(self, name))}"
                )
        if self.classes is not None:
            if len(self.classes) < 2:
                raise ValueError(f"classes needs at least two names, found {self.classes}")
            if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
                raise ValueError(f"classes: found {some(twice)} twice; allowed: each name once")
        if self.label_space and (self.classes is not None or self.order != "official"):
            raise ValueError(
                "label_space: keeps the data set's own numbers; allowed: without classes and order"
            )
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: found {self.resize}; allowed: size ({self.size}) or more")
        if (self.domain is None) == (self.kind == "domainnet"):
            raise ValueError(
                f"domain: found {self.domain} for {self.kind}; allowed: a domain for domainnet, else none"
            )
        return self


class TaskSettings(Section):
    """A source network together with its data. ``checkpoint``: its file, by its name in the store, or anywhere.

    ``classes`` is the width of its head where that differs from the architecture's; so is ``data.label_space``.
    """

    checkpoint: Place
    data: Data
    classes: Count | None = None


class Finetune(Section):
    """SGD with Nesterov momentum, one cycle of warm-up and cosine decay. ``epochs: 0`` keeps the checkpoint."""

    epochs: Whole
    batch_size: Count = 64
    learning_rate: Positive = 0.1
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    warmup: Fraction = 0.15
    label_smoothing: Fraction = 0.0
    shift: Shift = 1  # random translation, pixels
    flip: bool = False  # random mirror image


class Architecture(Section):
    """A constructor by name and its arguments; stages.core.networks.architectures checks both."""

    name: Constructor
    arguments: Annotated[dict[str, Any], AfterValidator(_check_numbers)] = Field({})


class Profile(Section):
    """One merging problem: an architecture and two or more tasks.

    In the tasks' checkpoints `{folder}` stands for ``folder``, and `{variant}` for the task's own of ``variants``.
    """

    architecture: Architecture
    folder: Name | None = None
    variants: list[Name] | None = None
    labels: Literal["shared", "separate"]
    tasks: dict[Name, TaskSettings]
    finetune: Finetune
    proxy: Data | None = None  # images of no task, for methods with `data: proxy`

    @property
    def data(self) -> dict[str, Data]:
        """Every image set of the profile, by what uses it."""
        found = {f"task {name}": task.data for name, task in self.tasks.items()}
        return found if self.proxy is None else {**found, "proxy": self.proxy}

    def architecture_of(self, task: str) -> Architecture:
        """The profile's architecture with a task's own number of classes."""
        classes = self.tasks[task].classes or self.tasks[task].data.label_space
        own = {} if classes is None else {"classes": classes}
        return Architecture(name=self.architecture.name, arguments={**self.architecture.arguments, **own})

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, found: Any) -> Any:
        """Put ``folder`` and ``variants`` into the checkpoints; malformed values are left to the types' checks."""
        tasks, variants = (
            (found.get(key) for key in ("tasks", "variants")) if isinstance(found, dict) else (None, None)
        )
        if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
            return found
        if variants is not None and (not isinstance(variants, list) or len(variants) != len(tasks)):
            raise ValueError(
                f"variants: found {variants}; allowed: one for each of {', '.join(map(str, tasks))}"
            )
        filled = {}
        for name, variant in zip(tasks, variants or [None] * len(tasks), strict=True):
            place = tasks[name].get("checkpoint")
            for key, value in (("folder", found.get("folder")), ("variant", variant)):
                if isinstance(place, str) and isinstance(value, str):
                    place = place.replace(f"{{{key}}}", value)
            filled[name] = (
                {**tasks[name], "checkpoint": place} if "checkpoint" in tasks[name] else tasks[name]
            )
        return {**found, "tasks": filled}

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        if len(self.tasks) < 2:
            raise ValueError(f"tasks needs at least two tasks, found {list(self.tasks)}")
        if "average" in self.tasks:
            raise ValueError("tasks.average: this name is the mean's over all tasks; allowed: another name")
        for name, task in self.tasks.items():
            if task.data.kind == "photographs":
                raise ValueError(f"task {name}: data.kind: photographs have no labels; allowed: as a proxy")
        if self.labels == "shared":
            self._check_shared()
        first = next(iter(self.tasks.values())).data
        if self.proxy and (self.proxy.size, self.proxy.channels) != (first.size, first.channels):
            raise ValueError(
                f"proxy: found {self.proxy.channels} channels of {self.proxy.size} pixels; "
                f"allowed: those of the tasks, {first.channels} of {first.size}"
            )
        return self

    def _check_shared(self) -> None:
        """Named classes of one label space are the same in the same order; others are compared when they are read."""
        named = {
            name: task.data.classes for name, task in self.tasks.items() if task.data.classes is not None
        }
        for name, classes in named.items():
            first = next(iter(named))
            if classes != named[first]:
                one, other = next(
                    (a, b) for a, b in zip_longest(named[first], classes) if a != b
                )  # None where a list has ended
                raise ValueError(
                    f"task {name}: data.classes: found {other!r} where task {first} has {one!r}; allowed with labels: "
                    "shared: the same names in the same order"
                )
