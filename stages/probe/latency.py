"""Measured time of a forward pass relative to one source network."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from stages.core.merged.tuning import fastest


@torch.no_grad()
def relative_latency(
    candidate: Callable[[Tensor], object],
    sources: Sequence[Callable[[Tensor], object]],
    x: Tensor,
    repeats: int,
) -> float:
    """Shortest time of ``candidate(x)`` over the mean of the sources' shortest times.

    The shortest of ``repeats`` runs is the one that the rest of the machine disturbed least; runs alternate, and the
    first ones warm up and are left out.
    """
    own, *others = fastest([partial(run, x) for run in (candidate, *sources)], x, repeats)
    return own / statistics.mean(others)
