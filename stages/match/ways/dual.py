"""MuDSC (Xu et al. 2024): units are paired by weights and activations at once."""

from torch import Tensor

from stages.core.recipe.rooms import MATCHINGS
from stages.match.dual import match_dual
from stages.match.given import Given


@MATCHINGS.register(uses=("rho", "sweeps"))
def by_both(given: Given) -> dict[str, Tensor]:
    """{group: int64 (N, d)}."""
    spec, states, settings = given.spec, given.states, given.settings
    alike = dict[str, Tensor]()
    for name in spec.ordered:
        alike |= given.statistics.between(spec, name, "correlation")
    return match_dual(spec, states, alike, settings.rho, given.generator, settings.sweeps)[0]
