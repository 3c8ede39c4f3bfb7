"""Git Re-Basin (Ainsworth et al. 2023): units are paired by the weights that write and read them."""

from torch import Tensor

from stages.core.recipe.rooms import MATCHINGS
from stages.match.given import Given
from stages.match.weights import match_weights


@MATCHINGS.register(uses=("sweeps", "restarts"))
def by_weights(given: Given) -> dict[str, Tensor]:
    """{group: int64 (N, d)}: the best of several random orders."""
    states, settings = given.states, given.settings
    runs = [
        match_weights(given.spec, states, given.generator, settings.sweeps) for _ in range(settings.restarts)
    ]
    return max(runs, key=lambda run: run[1][-1])[0]
