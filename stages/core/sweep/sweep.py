"""Run several networks in lockstep over a data set, node by node.

All batches go through a node, in every source network and in the merged network that is being built, before any
goes to the next; a value is freed after its last use. So each image passes each network exactly once, whatever the
depth, and whoever looks on sees a layer's inputs and outputs over the whole data set at that moment.

Held in memory: for every image the values that a later node still reads, of every network, in the storage type,
and at a watched node its inputs beside its outputs; what one batch is worked with, which batches are small enough to
bound; what the visitor holds. ``peak_bytes`` says how much that is before anything runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from stages.core.graph.nodes import Node
from stages.core.graph.trace import Trace
from stages.core.merged.network import MergedNetwork, Source
from stages.core.runtime.device import return_freed_memory
from stages.core.runtime.errors import InputError

GIB = 2**30
NO_TASK = -1
ENTRIES = 2**24  # of a batch's largest value, unless a single image has more


@dataclass(frozen=True)
class Batch:
    """images: (n, ...) preprocessed, all of one task (an index; ``NO_TASK`` for images that belong to none)."""

    images: Tensor
    task: int


class Visitor(Protocol):
    """Looks at the nodes it wants, after the sources ran them and before the merged network does."""

    def wants(self, node: Node) -> bool: ...

    def visit(self, node: Node, sweep: "Sweep") -> None: ...

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        """What the visitor holds at most while it visits a node, of so many images, at most ``batch`` at a time."""
        ...


class Sweep:
    """One pass of all batches, large ones in parts. The merged network is optional; it runs with the weights it
    has at that moment."""

    def __init__(
        self,
        sources: Sequence[Source],
        batches: Sequence[Batch],
        merged: MergedNetwork | None = None,
        storage: torch.dtype | None = None,
    ) -> None:
        trace = sources[0].trace if sources else merged.trace
        self.sources, self.merged, self.graph = sources, merged, trace.graph
        self.batches = batches = bounded(batches, trace)
        return_freed_memory()
        self.dtype = batches[0].images.dtype
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
        for node in tqdm(nodes, desc=progress, unit="node", leave=False, disable=None if progress else True):
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
            run = self._actors[actor].run_node
            out.append(run(node, inputs, self.batches[index].task).to(self.storage))
            for name in done:
                values[name][index] = None
        values[node.name] = out


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


def peak_bytes(
    trace: Trace,
    networks: int,
    batches: Sequence[Batch],
    visitor: Visitor,
    merged: MergedNetwork | None = None,
    storage: torch.dtype | None = None,
) -> int:
    """What a sweep holds at most: values of all images at the worst node, and what the visitor holds there."""
    images = sum(len(batch.images) for batch in batches)
    batch = max(len(batch.images) for batch in bounded(batches, trace))
    own = batches[0].images.element_size()
    itemsize = (storage or batches[0].images.dtype).itemsize
    own_entries = {name: networks * shape.numel() for name, shape in trace.shapes.items()}
    entries = {
        name: count + (0 if merged is None else merged.entries(name)) for name, count in own_entries.items()
    }
    last, first = trace.graph.last_uses(), trace.graph.nodes[0].name
    always = images * trace.shapes[first].numel() * own  # the images themselves, once and in their own type
    entries[first] = live = peak = 0
    for node in trace.graph.nodes[1:]:
        freed = sum(entries[name] for name in last[node.name])
        watched = visitor.wants(node)
        held = live + entries[node.name] - (0 if watched else min(freed, entries[node.name]))
        peak = max(peak, always + held * images * itemsize)
        if watched:  # before the merged network runs
            held = live + own_entries[node.name]
            extra = visitor.extra_bytes(node, images, batch)
            peak = max(peak, always + held * images * itemsize + extra)
        live += entries[node.name] - freed
    return peak


def check_memory(needed: int, limit_gib: float | None, device: torch.device, what: str) -> None:
    """Gate: refuse what will not fit. ``limit_gib`` None: what the machine or the GPU has free.

    Raises InputError saying what is needed, what there is and which parameters make it smaller.
    """
    if limit_gib is not None:
        available = limit_gib * GIB
    elif device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"{what}: needs {needed / GIB:.2f} GiB, there are {math.floor(available / GIB * 100) / 100:.2f} GiB; "
            "allowed: fewer images, storage: bfloat16, or a larger memory limit"
        )
