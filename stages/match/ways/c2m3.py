"""C2M3 (Crisostomi et al. 2024): all networks are matched to one universe of units, by Frank-Wolfe."""

from torch import Tensor

from stages.core.recipe.rooms import MATCHINGS
from stages.match.given import Given
from stages.match.universe import match_universe


@MATCHINGS.register(uses=("sweeps",))
def by_universe(given: Given) -> dict[str, Tensor]:
    """{group: int64 (N, d)}."""
    return match_universe(given.spec, given.states, given.generator, given.settings.sweeps)[0]
