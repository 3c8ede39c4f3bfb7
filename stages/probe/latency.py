"""Measured time of a forward pass relative to one source network."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    runs: list[Callable[[Tensor], object]] = [candidate, *sources]
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for run, own in zip(runs, times, strict=True):
            seconds = _timed(run, x)
            if repeat >= 2:
                own.append(seconds)
    shortest = [min(own) for own in times]
    return shortest[0] / statistics.mean(shortest[1:])


def _timed(run: Callable[[Tensor], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
