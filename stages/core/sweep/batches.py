"""Batches of images of one task each."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stages.core.graph.trace import Trace
from stages.core.runtime import ranks

NO_TASK = -1
ENTRIES = 2**24  # of a batch's largest value, unless a single image has more


class LateImages(Protocol):
    """Many images of which some are made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """chosen: int64 (n,). Returns (n, ...) preprocessed, each time the same."""
        ...


class Batch:
    """Images of one task (an index; ``NO_TASK`` for images that belong to none), at hand or made when asked for."""

    def __init__(
        self, images: Tensor | LateImages, task: int, chosen: Tensor | None = None, held: bool = False
    ) -> None:
        """images: (n, ...) preprocessed; or more of them, and which are ``chosen``: int64 (n,). held: out, from what is
        learnt with the others."""
        self._images, self.task, self._chosen, self.held = images, task, chosen, held

    def __len__(self) -> int:
        return len(self._images if self._chosen is None else self._chosen)

    @property
    def images(self) -> Tensor:
        """(n, ...) preprocessed."""
        return self._images if self._chosen is None else self._images[self._chosen]

    @property
    def shape(self) -> torch.Size:
        """That of one image; of those that are made when asked for the first is."""
        return self._images.shape[1:] if self.at_hand else self._images[self._chosen[:1]].shape[1:]

    @property
    def at_hand(self) -> bool:
        """Whether they are in memory anyway."""
        return isinstance(self._images, Tensor)

    @property
    def copied(self) -> bool:
        """Whether asking for them makes others, although they are at hand."""
        return self.at_hand and self._chosen is not None

    def split(self, most: int) -> list["Batch"]:
        """The same images, so many at a time."""
        if len(self) <= most:
            return [self]
        if self._chosen is None:
            return [Batch(part, self.task, None, self.held) for part in self._images.split(most)]
        return [Batch(self._images, self.task, part, self.held) for part in self._chosen.split(most)]

    def apart(self, held: Tensor) -> list["Batch"]:
        """The same images in two: those that are not ``held`` out, bool (n,), and those that are; one where the other
        has none."""
        places = ((~held).nonzero().flatten(), held.nonzero().flatten())
        return [
            Batch(self._images, self.task, own if self._chosen is None else self._chosen[own], bool(part))
            for part, own in enumerate(places)
            if len(own)
        ]

    def of_task(self, task: int) -> "Batch":
        """The same images of another task."""
        return Batch(self._images, task, self._chosen, self.held)


def task_counts(batches: Sequence[Batch]) -> dict[int, int]:
    """Images of each task, of all ranks."""
    counts: dict[int, int] = {}
    for own in ranks.said_by_all([(batch.task, len(batch)) for batch in batches]):
        for task, images in own:
            counts[task] = counts.get(task, 0) + images
    return counts


def task_weights(counts: Mapping[int, int]) -> dict[int, float]:
    """Weight of an image of each task: every task weighs the same, whatever its number of images; 1 on average.

    counts: images of each task, as of ``task_counts``.
    """
    return {task: sum(counts.values()) / (len(counts) * count) for task, count in counts.items()}


def images_to_batches(images: Sequence[Tensor | LateImages], batch_size: int) -> list[Batch]:
    """images: (n, ...) of each task, at hand or made when asked for. Returns batches of one task, task after task.

    What is made when asked for is shared out among the ranks.
    """
    whole = [
        Batch(own, task, None if isinstance(own, Tensor) else ranks.share(len(own)))
        for task, own in enumerate(images)
    ]
    return [part for own in whole for part in own.split(batch_size)]


def bounded(batches: Sequence[Batch], trace: Trace) -> list[Batch]:
    """The same images in batches whose values have at most ``ENTRIES`` entries in any one network."""
    most = max(1, ENTRIES // trace.largest)
    return [part for batch in batches for part in batch.split(most)]
