"""Batches of images of one task each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stages.core.graph.trace import Trace

NO_TASK = -1
ENTRIES = 2**24  # of a batch's largest value, unless a single image has more


@dataclass(frozen=True)
class Batch:
    """images: (n, ...) preprocessed, all of one task (an index; ``NO_TASK`` for images that belong to none)."""

    images: Tensor
    task: int


def task_weights(batches: Sequence[Batch]) -> dict[int, float]:
    """Weight of an image of each task: every task weighs the same, whatever its number of images; 1 on average."""
    counts: dict[int, int] = {}
    for batch in batches:
        counts[batch.task] = counts.get(batch.task, 0) + len(batch.images)
    return {task: sum(counts.values()) / (len(counts) * count) for task, count in counts.items()}


def images_to_batches(images: Sequence[Tensor], batch_size: int) -> list[Batch]:
    """images: one (n, ...) tensor per task. Returns batches of one task each, task after task."""
    return [Batch(part, task) for task, own in enumerate(images) for part in own.split(batch_size)]


def bounded(batches: Sequence[Batch], trace: Trace) -> list[Batch]:
    """The same images in batches whose values have at most ``ENTRIES`` entries in any one network."""
    most = max(1, ENTRIES // max(shape.numel() for shape in trace.shapes.values()))
    return [Batch(part, batch.task) for batch in batches for part in batch.images.split(most)]
