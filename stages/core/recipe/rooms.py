"""The ways of doing a part of a merge: one file of a room each, under the file's name. A new file is a new way.

What a file holds registers itself, with the settings that it uses:

    @SOLVERS.register(uses=("ridge",))
    def shrunk(setup): ...

Only the file that is asked for is imported. A stage asks the rooms that it depends on; the first one looks at the
settings that all of them declare (``check_rows``), so that a misspelt one is said before anything is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from stages.core.recipe.methods import Fit, MatchSettings, Method, Open
from stages.core.recipe.recipe import Recipe
from stages.core.runtime.errors import InputError
from stages.core.settings.sections import Section

TOP = Path(__file__).parents[3]
Maker = TypeVar("Maker", bound=Callable[..., Any])


@dataclass(frozen=True)
class Way:
    """What a file of a room registered.

    make: what it does, as its room asks. uses: the settings of the room's section that it looks at. own: those that it
    alone has. always: settings that are so by its definition. aligned: whether it needs the sources in merged order.
    owned: whether it needs to know whose an image is. chooses_ridge: whether its layers can choose one (ridge: auto).
    tuples: of an alignment that says itself which units belong together and what each tuple is worth apart, ({group:
    int64 (N, d)}, {group: (d,)}); by default its strongest ties, and what is measured.
    """

    name: str
    make: Callable[..., Any]
    uses: Sequence[str] = ()
    own: type[Section] | None = None
    always: Mapping[str, Any] = field(default_factory=dict)
    aligned: bool = False
    owned: bool = False
    chooses_ridge: bool = False
    tuples: Callable[..., Any] | None = None


class Room:
    """The ways in the folder of a package. choice: the setting that names one; common: the settings of every way."""

    def __init__(self, package: str, choice: str, common: Sequence[str] = (), beside: "Room | None" = None):
        self.package, self.choice, self.common, self.beside = package, choice, common, beside
        self._ways: dict[str, Way] = {}

    def register(self, **declared: Any) -> Callable[[Maker], Maker]:
        """Let the decorated function or class be the way of its file's name. declared: see ``Way``."""

        def keep(make: Maker) -> Maker:
            name = make.__module__.rpartition(".")[2]
            self._ways[name] = Way(name, make, **declared)
            return make

        return keep

    @property
    def names(self) -> list[str]:
        """Of the files that are there."""
        folder = TOP.joinpath(*self.package.split("."))
        return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))

    def way(self, name: str, key: str = "") -> Way:
        """Import the file of a name. key: where it was found. Raises InputError where there is none."""
        if name not in self.names:
            allowed = sorted({*self.names, *(self.beside.names if self.beside else ())})
            raise InputError(f"{key or self.choice}: found {name!r}; allowed: {', '.join(allowed)}")
        import_module(f"{self.package}.{name}")
        if name not in self._ways:
            path = f"{self.package.replace('.', '/')}/{name}.py"
            raise InputError(f"{path}: registers nothing; allowed: one function or class with @register")
        return self._ways[name]

    def of(self, settings: Open, key: str = "") -> Way:
        """The way that a section names, checked: it has no settings but those that the way uses.

        key: of the section. Raises InputError in one line.
        """
        where = f"{key}: " if key else ""
        way = self.way(getattr(settings, self.choice), f"{key}.{self.choice}" if key else "")
        own = way.own.model_fields if way.own else ()
        allowed = (self.choice, *way.uses, *own, *self.common)
        for name in settings.model_fields_set:
            if name not in allowed:
                raise InputError(
                    f"{where}{name}: not a setting of {self.choice}: {way.name}; allowed: {', '.join(allowed)}"
                )
        if way.own is not None:
            try:
                settings.own(way.own)
            except InputError as error:
                raise InputError(f"{where}{error}") from error
        return way


ALIGNMENTS = Room("stages.core.align.ways", "by", ("data", "allocate"))
MATCHINGS = Room("stages.match.ways", "by", ("data", "allocate"), ALIGNMENTS)
SOLVERS = Room("stages.fit.solvers", "solver", ("refine",))
RECALIBRATIONS = Room("stages.recalibrate.ways", "recalibrate")


def check_match(settings: MatchSettings, key: str = "match") -> Way:
    """The way of a matching. Raises InputError in one line."""
    return (ALIGNMENTS if settings.by in ALIGNMENTS.names else MATCHINGS).of(settings, key)


def check_fit(fit: Fit, data: str = "own", key: str = "fit") -> Way:
    """The way of a fit. Raises InputError in one line."""
    way = SOLVERS.of(fit, key)
    if data == "proxy" and way.always.get("targets", fit.targets) == "own":
        raise InputError(
            f"{key}: found data: proxy with targets: own; allowed: targets: ensemble, a proxy has no owner"
        )
    return way


def check_recalibration(name: str, data: str = "own", key: str = "recalibrate") -> Way:
    """The way of a recalibration. Raises InputError in one line."""
    way = RECALIBRATIONS.way(name, key)
    if data == "proxy" and way.owned:
        raise InputError(f"{key}: found data: proxy with {name}, which is per task; allowed: data: own")
    return way


def check_rows(recipe: Recipe, path: str = "params.yaml") -> None:
    """Every matching and every row, those of the full list too, against what the rooms' files declare."""
    for name, settings in recipe.match.items():
        check_match(settings, f"{path}: match.{name}")
    for section in ("methods", "full"):
        for name, method in getattr(recipe, section).items():
            check_row(method, f"{path}: {section}.{name}.")


def check_row(method: Method, key: str = "") -> None:
    """A row against what the files of its fit and its recalibration declare. Raises InputError in one line."""
    check_fit(method.fit, method.data, f"{key}fit")
    check_recalibration(method.recalibrate, method.data, f"{key}recalibrate")
