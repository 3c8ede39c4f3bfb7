"""Units are paired by their position: no matching."""

from torch import Tensor

from stages.core.recipe.rooms import MATCHINGS
from stages.core.units.matching import identity_matching
from stages.match.given import Given


@MATCHINGS.register()
def by_position(given: Given) -> dict[str, Tensor]:
    """{group: int64 (N, d)}."""
    return dict(identity_matching(given.spec, len(given.sources)).units)
