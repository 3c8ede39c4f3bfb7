"""Units are paired by what they do: one assignment of each group on the similarity of activations."""

from torch import Tensor

from stages.core.recipe.rooms import MATCHINGS
from stages.match.assign import assign_parts_jointly
from stages.match.given import Given


@MATCHINGS.register(uses=("similarity", "sweeps"))
def by_activations(given: Given) -> dict[str, Tensor]:
    """{group: int64 (N, d)}. Units inside parts are put in order by their own activations."""
    spec, units = given.spec, {}
    for name, group in spec.ordered.items():
        alike = given.statistics.between(spec, name, given.settings.similarity)
        parts, inside = assign_parts_jointly(alike, group.size, given.settings.sweeps, group.fixed)
        units |= spec.tables(name, parts, inside)
    return units
