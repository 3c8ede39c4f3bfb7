"""What a layer's fit is given: inputs and targets over all images, as maps or as rows, and what they count for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.core.runtime import ranks
from stages.core.sweep.rows import draw_places, drawn_rows, input_rows, output_rows, place_rows
from stages.core.sweep.sweep import Sweep
from stages.core.sweep.values import Kept
from stages.fit.equations.ridge import flags
from stages.fit.features import inputs_of, targets_of
from stages.fit.layer import Layer


@dataclass(frozen=True)
class LayerSolution:
    """What is left of a layer's targets, and their energy; where the fit has one, the intercept that it asks for.

    bias: (d_out,). moments: (2, d_out), mean and variance of what the weights alone give. float64, zero for rows that
    were not fitted. ridge: with which it was solved, where it was.
    """

    residual: float
    energy: float
    bias: Tensor | None = None
    moments: Tensor | None = None
    ridge: float | None = None


class LayerProblem:
    """A ``layer`` with its data: every batch of a sweep."""

    def __init__(self, layer: Layer, sweep: Sweep) -> None:
        self.layer, self.setup, self.node = layer, layer.setup, layer.node
        self._sweep = sweep
        self.dtype = sweep.dtype

    def batches(self) -> Iterator[tuple[int, int, float]]:
        """Index, task and weight of every batch; its images weigh alike."""
        for index, batch in enumerate(self._sweep.batches):
            yield index, batch.task, self._sweep.weights[batch.task]

    def size(self, index: int) -> int:
        """Images of a batch."""
        return len(self._sweep.batches[index])

    def tasks(self) -> Iterator[tuple[int, int]]:
        """Where each task's images start among all, and how many there are, on all ranks."""
        start = 0
        for _, images in sorted(self._sweep.counts.items()):
            yield start, images
            start += images

    def images(self, task: int | None = None) -> int:
        """How many there are, of one task or in all, on all ranks."""
        return sum(images for own, images in self._sweep.counts.items() if task in (None, own))

    def parts(self) -> int:
        """Into how many the images are taken apart: those that the ridge is chosen by are the second."""
        return self._sweep.parts

    def part(self, index: int) -> int:
        """Which of them a batch is of."""
        return int(self._sweep.batches[index].held)

    def count(self, part: int, task: int | None = None) -> int:
        """How many images one of them has, of one task or in all."""
        own = (len(b) for b in self._sweep.batches if b.held == bool(part) and task in (None, b.task))
        return sum(ranks.said_by_all(sum(own)))

    def inputs(self, index: int) -> Tensor:
        """z of one batch, in the merged network's entries."""
        return inputs_of(self.setup, self.node, self._sweep, index)

    def targets(self, index: int) -> Tensor:
        """y of one batch, in the merged network's entries."""
        return targets_of(self.setup, self.node, self._sweep, index)

    def source(self, network: int, index: int) -> Tensor:
        """What the layer gives in one of the sources, for one batch."""
        return self._sweep.source(network, self.node.name, index)

    @cached_property
    def fifth(self) -> list[Tensor] | None:
        """A fifth of each task's images, as flags of each batch: bool (n,); None where a task has too few.

        They are those that the ridge is chosen by, where it is.
        """
        if self.parts() == 1:
            return flags(self._sweep.batches)
        return [torch.full((len(batch),), batch.held) for batch in self._sweep.batches]

    def keep(self) -> Kept:
        """A place for one tensor of each batch, where the sweep's values are."""
        return self._sweep.keeper.new()

    def counted(self, task: int) -> Tensor:
        """Which outputs an image of ``task`` counts for: bool (1, d_out)."""
        owner = self.layer.module.outputs.owner
        counted = owner == task if self.layer.own_rows else torch.ones_like(owner, dtype=torch.bool)
        return counted[None].to(self.layer.device)

    def by_rows(self, z: Tensor, y: Tensor, use: Callable[[Tensor, Tensor], None]) -> None:
        """Call ``use`` with the rows of some images' z and y, a few images at a time."""
        step = self.layer.images_by_row
        for z_some, y_some in zip(z.split(step), y.split(step), strict=True):
            drawn, y_rows = self._drawn(len(z_some)), output_rows(self.node, y_some)
            if drawn is not None:
                y_rows = y_rows[place_rows(drawn, self.layer.places).to(y_rows.device)]
            use(self._input_rows(z_some, drawn), y_rows)

    def each_input_rows(self, index: int, use: Callable[[Tensor], None]) -> None:
        """The same of z alone, of one batch."""
        for z_some in self.inputs(index).split(self.layer.images_by_row):
            use(self._input_rows(z_some, self._drawn(len(z_some))))

    def _input_rows(self, z: Tensor, drawn: Tensor | None) -> Tensor:
        """Of some images, at the drawn places or at all."""
        if drawn is not None and self.node.operation == "conv2d":
            return drawn_rows(self.node, z, self.layer.kernel, drawn)
        rows = input_rows(self.node, z, self.layer.kernel)
        return rows if drawn is None else rows[place_rows(drawn, self.layer.places).to(rows.device)]

    def _drawn(self, images: int) -> Tensor | None:
        """The places of each image whose rows are used, where that is not all of them."""
        if self.setup.positions == 1 or self.node.operation == "linear" or self.layer.places == 1:
            return None
        self.setup.check_one_size(f"positions {self.setup.positions:g}")
        return draw_places(images, self.layer.places, self.setup.positions, self.setup.generator)
