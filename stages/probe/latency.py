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
    """Median time of ``candidate(x)`` over the mean of the sources' medians.

    Runs alternate, so that what else the machine does falls on all alike; the first ones warm up and are left out.
    """
    runs: list[Callable[[Tensor], object]] = [candidate, *sources]
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for run, own in zip(runs, times, strict=True):
            seconds = _timed(run, x)
            if repeat >= 2:
                own.append(seconds)
    medians = [statistics.median(own) for own in times]
    return medians[0] / statistics.mean(medians[1:])


def _timed(run: Callable[[Tensor], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
