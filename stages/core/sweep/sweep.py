"""Run several networks in lockstep over a data set, node by node.

All batches go through a node, in every source network and in the merged network that is being built, before any
goes to the next; a value is freed after its last use. So each image passes each network exactly once, whatever the
depth, and whoever looks on sees a layer's inputs and outputs over the whole data set at that moment.

Held in memory: for every image the values that a later node still reads, of every network, in the storage type,
and at a watched node its inputs beside its outputs; what one batch is worked with, which batches are small enough to
bound; what the visitor holds. ``peak_bytes`` says how much that is before anything runs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.graph.source import Source
from stages.core.graph.trace import Trace
from stages.core.runtime.device import return_freed_memory
from stages.core.runtime.progress import Bar
from stages.core.sweep.batches import Batch, bounded, task_weights


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


class Sweep:
    """One pass of all batches, large ones in slices. The merged network is optional; it runs with the weights it
    has at that moment."""

    def __init__(
        self,
        sources: Sequence[Source],
        batches: Sequence[Batch],
        merged: Merged | None = None,
        storage: torch.dtype | None = None,
    ) -> None:
        self.trace = trace = sources[0].trace if sources else merged.trace
        self.sources, self.merged, self.graph = sources, merged, trace.graph
        self.batches = batches = bounded(batches, trace)
        return_freed_memory()
        self.dtype = batches[0].images.dtype
        if not self.dtype.is_floating_point:  # integers go in, what follows has the weights' type
            tensors = sources[0].state.values() if sources else merged.parameters()
            self.dtype = next(t.dtype for t in tensors if t.is_floating_point())
        self.device = batches[0].images.device
        self.storage = storage or self.dtype
        self.weights = task_weights(batches)
        self._actors = [*sources, *([] if merged is None else [merged])]
        first = self.graph.nodes[0].name
        self._values: list[dict[str, list[Tensor | None]]] = [
            {first: [batch.images for batch in batches]} for _ in self._actors
        ]

    def source(self, network: int, name: str, batch: int) -> Tensor:
        """A source's value for one batch."""
        return self._values[network][name][batch].to(self.dtype)

    def of_merged(self, name: str, batch: int) -> Tensor:
        """The merged network's value for one batch."""
        return self._values[-1][name][batch].to(self.dtype)

    @torch.no_grad()
    def run(self, visitor: Visitor, progress: str | None = None) -> None:
        """Pass all batches through all nodes. ``progress``: the title of a progress bar."""
        last = self.graph.last_uses()
        nodes = self.graph.nodes[1:]
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
                    values.pop(name, None)

    def _run(self, actor: int, node: Node, done: Sequence[str]) -> None:
        """One node of one network for all batches; inputs in ``done`` are freed batch by batch."""
        values = self._values[actor]
        out: list[Tensor | None] = []
        for index in range(len(self.batches)):
            inputs = [values[name][index].to(self.dtype) for name in node.inputs]
            if node.operation == "conv2d" and inputs[0].device.type == "cpu":
                inputs = [
                    inputs[0].contiguous(memory_format=torch.channels_last)
                ]  # faster; the order is kept
            run = self._actors[actor].run_node
            out.append(run(node, inputs, self.batches[index].task).to(self.storage))
            for name in done:
                values[name][index] = None
        values[node.name] = out
