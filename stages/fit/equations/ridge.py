"""A layer's ridge from its data, without labels: what is learnt with it from most images errs least on the rest.

Images are held out, not rows: the positions of one image tell of each other. The search goes downhill over a grid, from
its middle or from where it ended for a layer of as many inputs, and tries three to five ridges: but for noise, the loss
of ridge regression has one valley.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stages.core.recipe.sections import RIDGE_OF_FEW
from stages.core.runtime import ranks
from stages.core.sweep.batches import Batch, task_counts

GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, 3))  # 1e-4, 3e-4, ..., 10
MIDDLE = GRID[5]  # 0.03
ONE_IN = 5

Losses = Callable[[Sequence[float]], list[float]]  # of ridges that are asked for together


def held_out(count: int, start: int = 0) -> Tensor:
    """Which of ``count`` images of a task, ``start`` before them, are held out: bool (count,)."""
    return torch.arange(start, start + count) % ONE_IN == ONE_IN // 2


def flags(batches: Sequence[Batch]) -> list[Tensor] | None:
    """Which images of each batch are held out, bool (n,); None where a task has too few.

    They are the same for any number of ranks.
    """
    counts = task_counts(batches)
    if not enough(counts.values()):
        return None
    found = []
    seen = Counter({task: int(ranks.share(count)[0]) for task, count in counts.items()})
    for batch in batches:
        found.append(held_out(len(batch), seen[batch.task]))
        seen[batch.task] += len(batch)
    return found


def apart(batches: Sequence[Batch]) -> list[Batch]:
    """The same images, those that are held out in batches of their own; as they are where a task has too few."""
    held = flags(batches)
    if held is None:
        return list(batches)
    return [part for batch, own in zip(batches, held, strict=True) for part in batch.apart(own)]


def enough(counts: Iterable[int]) -> bool:
    """Whether every task has images of which one can be held out."""
    return min(counts) >= ONE_IN


def decide(ridge: float | str, losses: Losses | None, start: float = MIDDLE) -> float:
    """The ridge that is fixed, or that is chosen from ``start`` on. losses: None where no images are held out."""
    if ridge != "auto":
        return ridge
    return RIDGE_OF_FEW if losses is None else choose(losses, start)


def choose(losses: Losses, start: float = MIDDLE) -> float:
    """The ridge of GRID with the lowest loss, as far as it can be seen from its neighbours."""
    seen: dict[int, float] = {}
    best = GRID.index(start)
    while True:
        near = [index for index in (best + 1, best - 1) if 0 <= index < len(GRID)]
        new = [index for index in (best, *near) if index not in seen]
        seen.update(zip(new, losses([GRID[index] for index in new]), strict=True))
        better = min(near, key=seen.__getitem__)
        if not seen[better] < seen[best]:
            return GRID[best]
        best = better
