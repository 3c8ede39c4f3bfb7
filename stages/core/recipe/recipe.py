"""What merging reads of params.yaml, checked: the rows of the result table, and the sections of the later stages.

Apart from the settings that training reads, so that a new way of matching or fitting is no reason to train a network
again."""

from pydantic import ValidationError, model_validator

from stages.core.recipe.methods import MatchSettings, Method
from stages.core.recipe.names import now_called
from stages.core.recipe.sections import (
    AllocateSection,
    FitSection,
    ProbeSection,
    RecalibrateSection,
)
from stages.core.runtime.errors import InputError
from stages.core.settings.params import Params, first_line
from stages.core.settings.sections import Name, Section, StatisticsSection


class Recipe(Section):
    """Named matchings, the methods that use them, and how each stage does its part.

    ``full`` is not run: it is what `-S 'methods=${full}'` sets.
    """

    statistics: StatisticsSection
    match: dict[Name, MatchSettings]
    allocate: AllocateSection
    fit: FitSection
    recalibrate: RecalibrateSection
    probe: ProbeSection
    methods: dict[Name, Method]
    full: dict[Name, Method]

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if not self.methods:
            raise ValueError("methods: found none; allowed: one or more rows of the result table")
        former = [now_called(f"match.{name}", "matching", name) for name in self.match]
        for section in ("methods", "full"):
            for name, method in getattr(self, section).items():
                former.append(now_called(f"{section}.{name}", "row", name))
                former.append(now_called(f"{section}.{name}.match", "matching", method.match))
        if any(former):
            raise ValueError(next(line for line in former if line))
        for name, method in {**self.full, **self.methods}.items():
            if method.match not in self.match:
                raise ValueError(
                    f"methods.{name}.match: found {method.match!r}; allowed: {', '.join(self.match)}"
                )
            if name in ("oracle", "ensemble"):
                raise ValueError(f"methods.{name}: this name is taken; the row is always in the table")
        return self

    @property
    def matchings(self) -> dict[str, MatchSettings]:
        """The named matchings that a method uses."""
        used = {method.match for method in self.methods.values()}
        return {name: matching for name, matching in self.match.items() if name in used}

    def method(self, name: str) -> Method:
        """A row by name. Raises InputError when there is none, with the present name where it is a former one."""
        former = now_called(f"methods.{name}", "row", name)
        if former:
            raise InputError(former)
        if name not in self.methods:
            raise InputError(f"method: found {name!r}; allowed: {', '.join(self.methods)}")
        return self.methods[name]

    def matching_of(self, name: str) -> MatchSettings:
        """The matching that a row uses."""
        return self.match[self.method(name).match]


def load_recipe(params: Params, path: str = "params.yaml") -> Recipe:
    """Check all that merging reads. Raises InputError in one line: the key, what was found and what is allowed."""
    found = {name: getattr(params, name) for name in Recipe.model_fields}
    try:
        recipe = Recipe.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{path}: {first_line(error, Recipe)}") from error
    for name, method in recipe.methods.items():
        if params.active.proxy is None and "proxy" in (method.data, recipe.match[method.match].data):
            raise InputError(
                f"{path}: methods.{name}: uses a proxy, which profile {params.profile} has not; "
                "allowed: a `proxy` in the profile, or data: own"
            )
    return recipe
