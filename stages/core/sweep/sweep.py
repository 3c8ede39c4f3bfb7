"""Run several networks in lockstep over a data set, node by node.

All batches go through a node, in every source network and in the merged network that is being built, before any
goes to the next; a value is freed after its last use. So each image passes each network exactly once, whatever the
depth, and whoever looks on sees a layer's inputs and outputs over the whole data set at that moment.

Held: for every image the values that a later node still reads, of every network, in the type they are kept in, and
at a watched node its inputs beside its outputs: in memory or on disk (stages.core.sweep.values). And in memory, what
one batch is worked with, which batches are small enough to bound, and what the visitor holds. How much that is,
stages.core.sweep.memory says before anything runs.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.graph.source import Source
from stages.core.graph.trace import Trace
from stages.core.runtime import ranks
from stages.core.runtime.device import freed_memory_returned
from stages.core.runtime.progress import Bar
from stages.core.sweep.batches import Batch, bounded, task_counts, task_weights
from stages.core.sweep.values import InMemory, Keeper, Kept


class Merged(Protocol):
    """The network that is being built, as far as a sweep needs to know it."""

    trace: Trace

    def run_node(self, node: Node, inputs: Sequence[Tensor], task: int | None = None) -> Tensor: ...

    def entries(self, value: str) -> int: ...

    def map_of(self, node: Node) -> torch.nn.Module: ...


class Visitor(Protocol):
    """Looks at the nodes it wants, after the sources ran them and before the merged network does."""

    def wants(self, node: Node) -> bool: ...

    def visit(self, node: Node, sweep: "Sweep") -> None: ...

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        """What the visitor holds at most while it visits a node, of so many images, at most ``batch`` at a time."""
        ...

    def kept_bytes(self, node: Node, images: int) -> int:
        """What it has the sweep keep of so many images meanwhile (``Sweep.keeper``)."""
        ...


class Sweep:
    """One pass of all batches, large ones in slices. The merged network is optional; it runs with the weights it
    has at that moment.

    precision: type in which values are kept, by default that of the images. ``keeper`` decides where they are.
    sparing: whether it holds no more memory than is predicted, to the last few percent (stages.core.sweep.memory).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batches: Sequence[Batch],
        merged: Merged | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.trace = trace = sources[0].trace if sources else merged.trace
        self.sources, self.merged, self.graph = sources, merged, trace.graph
        self.batches = batches = bounded(batches, trace)
        example = batches[0].images
        self.dtype, self.device = example.dtype, example.device
        if not self.dtype.is_floating_point:  # integers go in, what follows has the weights' type
            tensors = sources[0].state.values() if sources else merged.parameters()
            self.dtype = next(t.dtype for t in tensors if t.is_floating_point())
        self.image_bytes = example[0].nbytes
        self.precision = precision or self.dtype
        self.counts = task_counts(batches)
        self.weights = task_weights(self.counts)
        self.keeper, self.sparing = Keeper(), True
        self._actors = [*sources, *([] if merged is None else [merged])]
        self._values: list[dict[str, Kept]] = []

    @cached_property
    def parts(self) -> int:
        """Into how many its images are taken apart, on any rank: those held out are the second."""
        return 1 + any(ranks.said_by_all(any(batch.held for batch in self.batches)))

    def source(self, network: int, name: str, batch: int) -> Tensor:
        """A source's value for one batch."""
        return self._values[network][name][batch].to(self.dtype)

    def of_merged(self, name: str, batch: int) -> Tensor:
        """The merged network's value for one batch."""
        return self._values[-1][name][batch].to(self.dtype)

    def run(self, visitor: Visitor, progress: str | None = None) -> None:
        """Pass all batches through all nodes. ``progress``: the title of a progress bar."""
        try:
            with torch.no_grad(), freed_memory_returned() if self.sparing else nullcontext():
                self._pass(visitor, progress)
        finally:
            self.keeper.close()

    def _pass(self, visitor: Visitor, progress: str | None) -> None:
        last = self.graph.last_uses()
        first, *nodes = self.graph.nodes
        self._values = [{first.name: own} for own in self._images()]
        for node in Bar(nodes, desc=progress, unit="node", shown=bool(progress)):
            done = last[node.name]
            watched = visitor.wants(node)
            count = len(self.sources)
            for actor in range(count):
                self._run(actor, node, [] if watched else done)
            if watched:
                visitor.visit(node, self)
            if self.merged is not None:
                self._run(count, node, [] if watched else done)
            for values in self._values:
                for name in done:
                    if name in values:
                        values.pop(name).close()

    def _images(self) -> list[Kept]:
        """The images as every network's first value; on disk they are kept once."""
        if not self.keeper.on_disk:
            found = [batch.images for batch in self.batches]
            return [InMemory(found) for _ in self._actors]
        kept = self.keeper.new()
        for batch in self.batches:
            kept.append(batch.images)
        return [kept] * len(self._actors)

    def _run(self, actor: int, node: Node, done: Sequence[str]) -> None:
        """One node of one network for all batches; inputs in ``done`` are freed batch by batch."""
        values = self._values[actor]
        out = self.keeper.new()
        for index, batch in enumerate(self.batches):
            inputs = [values[name][index].to(self.dtype) for name in node.inputs]
            if node.operation == "conv2d" and inputs[0].device.type == "cpu":
                inputs = [
                    inputs[0].contiguous(memory_format=torch.channels_last)
                ]  # faster; the order is kept
            out.append(self._actors[actor].run_node(node, inputs, batch.task).to(self.precision))
            for name in done:
                values[name].free(index)
        values[node.name] = out
