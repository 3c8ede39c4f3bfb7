"""Joint first and second moments of the networks' features, group by group and task by task, in one sweep.

A group's features are the values that Linear and Conv2d layers read of it, after the non-linearity and, apart from
that, before it. A residual stream is read at several places, which count alike.

Where the units of a group are parts (heads, groups of a convolution or a norm), the units inside them are gathered one
by one as well: which unit of one part resembles which of another, and so how alike two parts are, cannot be told from
parts as a whole. They are taken where a layer reads them; queries and keys, which none reads, where one writes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph import Node
from stages.core.layers import unit_rows
from stages.core.moments import PLACES, TaskMoments
from stages.core.network import Source
from stages.core.spec import Axis, Inner, Span
from stages.core.sweep import Batch, Sweep, check_memory, peak_bytes
from stages.core.trace import Trace

CHUNK = 2**24
ENDS = (
    "input",
    "linear",
    "conv2d",
    "batch_norm",
    "add",
    "multiply",
    "attention",
)  # what non-linearities come behind


@dataclass
class _Sums:
    mean: Tensor
    second: Tensor
    count: Tensor  # (T,)


class MomentsVisitor:
    """Accumulates the moments of every free group."""

    def __init__(
        self, trace: Trace, networks: int, tasks: int, positions: float, generator: torch.Generator
    ) -> None:
        self.trace, self.networks, self.tasks = trace, networks, tasks
        self.positions, self.generator = positions, generator
        self.at = places(trace)
        self.inside = places_inside(trace)
        self.found: dict[tuple[str, str], _Sums] = {}  # (place, group) -> sums of the places' means

    def wants(self, node: Node) -> bool:
        return node.name in self.at or node.name in self.inside

    def extra_bytes(self, node: Node, images: int) -> int:
        sizes = [(self.networks * group.size) ** 2 for group in self.trace.spec.free.values()]
        sizes += [(self.networks * i.parts * i.size) ** 2 for i in _single_units(self.trace)]
        return 8 * (self.tasks + 1) * (2 * sum(sizes) + max(sizes, default=0)) + 12 * CHUNK

    def visit(self, node: Node, sweep: Sweep) -> None:
        for place, name in self.at.get(node.name, ()):
            layout, start, segments = self.trace.layouts[name], 0, []
            for segment in layout.segments:
                segments.append((segment.group, start, segment.size, segment.block))
                start += segment.size * segment.block
            self._take(sweep, place, name, [own for own in segments if own[0] in self.trace.spec.free])
        for name, inner, span in self.inside.get(node.name, ()):
            self._take(
                sweep, "inside", name, [(inner.name, span.start, inner.parts * inner.size, span.block)]
            )

    def _take(
        self, sweep: Sweep, place: str, name: str, segments: Sequence[tuple[str, int, int, int]]
    ) -> None:
        """Segments of a value, (name, start, units, block), over all batches."""
        sums: dict[str, _Sums] = {}
        for index, batch in enumerate(sweep.batches):
            values = [sweep.source(m, name, index) for m in range(self.networks)]
            self._add(sums, self.trace.layouts[name].dim, values, segments, batch.task)
        for group, own in sums.items():
            self._count_alike((place, group), own)

    def _add(
        self,
        sums: dict[str, _Sums],
        dim: int,
        values: Sequence[Tensor],
        segments: Sequence[tuple[str, int, int, int]],
        task: int,
    ) -> None:
        for name, start, units, block in segments:
            own = [v.narrow(dim, start, units * block) for v in values]
            rows = torch.cat([unit_rows(v, dim, block) for v in own], 1)
            if self.positions < 1 and len(rows) > len(values[0]):
                count = max(1, round(self.positions * len(rows)))
                rows = rows[torch.randperm(len(rows), generator=self.generator)[:count].to(rows.device)]
            self._sum(sums, name, rows, task)

    def _sum(self, sums: dict[str, _Sums], group: str, rows: Tensor, task: int) -> None:
        """rows: (rows, N d)."""
        d = rows.shape[1]
        if group not in sums:
            sums[group] = self._zeros(d, rows.device)
        for part in rows.split(max(1, CHUNK // d)):
            sums[group].mean[task] += part.sum(0, dtype=torch.float64)
            sums[group].second[task] += (part.T @ part).double()
            sums[group].count[task] += len(part)

    def _count_alike(self, key: tuple[str, str], own: _Sums) -> None:
        if key not in self.found:
            self.found[key] = self._zeros(own.mean.shape[1], own.mean.device)
        self.found[key].mean += own.mean / own.count[:, None]
        self.found[key].second += own.second / own.count[:, None, None]
        self.found[key].count += 1

    def _zeros(self, d: int, device: torch.device) -> _Sums:
        shapes = (self.tasks, d), (self.tasks, d, d), (self.tasks,)
        return _Sums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def moments(self) -> dict[str, dict[str, TaskMoments]]:
        gathered: dict[str, dict[str, TaskMoments]] = {place: {} for place in PLACES}
        for (place, group), s in self.found.items():
            mean, second = s.mean / s.count[:, None], s.second / s.count[:, None, None]
            gathered[place][group] = TaskMoments(mean, second)
        return gathered


def places(trace: Trace) -> dict[str, list[tuple[str, str]]]:
    """Where features are taken: {node that is visited: (place, value)}. Every free group has one of each place."""
    at: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    covered: set[str] = set()
    for node in trace.graph.nodes:
        if node.linear and node.inputs[0] not in seen:
            seen.add(node.inputs[0])
            groups = {s.group for s in trace.layouts[node.inputs[0]].segments} & set(trace.spec.free)
            if groups:
                covered |= groups
                at.setdefault(node.name, []).append(("after", node.inputs[0]))
    for node in trace.graph.nodes:  # a group that no layer reads: what its layers write
        written = {s.group for s in trace.layouts[node.name].segments} & set(trace.spec.free)
        if node.linear and written - covered:
            seen.add(node.name)
            at.setdefault(node.name, []).append(("after", node.name))
    nodes = {node.name: node for node in trace.graph.nodes}
    for name in sorted(set[str]().union(*(_before(nodes, value) for value in seen))):
        if {s.group for s in trace.layouts[name].segments} & set(trace.spec.free):
            at.setdefault(name, []).append(("before", name))
    return at


def places_inside(trace: Trace) -> dict[str, list[tuple[str, Inner, Span]]]:
    """The same for units inside parts: {node that is visited: (value, units, where they lie on it)}."""
    at: dict[str, list[tuple[str, Inner, Span]]] = {}
    maps = [node for node in trace.graph.nodes if node.fitted]
    for inner in _single_units(trace):
        read, written = list[tuple[str, str, Span]](), list[tuple[str, str, Span]]()
        for node in maps:
            weight = node.parameters["weight"]
            for span in inner.spans:
                if span.axis == Axis(weight, 1):
                    read.append((node.name, node.inputs[0], span))
                elif span.axis == Axis(weight, 0):
                    written.append((node.name, node.name, span))
            if weight in inner.inside:
                read.append((node.name, node.inputs[0], Span(Axis(weight, 1))))
        seen = set[tuple[str, int]]()
        for node_name, value, span in read or written:
            if (value, span.start) not in seen:
                seen.add((value, span.start))
                at.setdefault(node_name, []).append((value, inner, span))
    return at


def _single_units(trace: Trace) -> list[Inner]:
    """What the groups with orders inside their units consist of."""
    outer = {inner.outer for inner in trace.spec.inner.values()}
    return [inner for name in trace.spec.ordered if name in outer for inner in trace.spec.contents(name)]


def _before(nodes: dict[str, Node], value: str) -> set[str]:
    """The values in front of the non-linearity (and pooling) that give ``value``."""
    node = nodes[value]
    if node.operation in ENDS:
        return {value}
    return set[str]().union(*(_before(nodes, name) for name in node.inputs))


def gather(
    sources: Sequence[Source],
    batches: Sequence[Batch],
    *,
    positions: float = 1.0,
    storage: torch.dtype = torch.float32,
    memory: float | None = None,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, TaskMoments]]:
    """Moments of every free group of the (unaligned) sources, by place and group.

    batches: unlabelled images of every task (a proxy's as one more task). positions: share of a feature map's
    positions that is used. memory: GiB, None for what is free. Raises InputError when it would not fit in memory.
    """
    trace = sources[0].trace
    generator = generator or torch.Generator().manual_seed(0)
    tasks = max(batch.task for batch in batches) + 1
    visitor = MomentsVisitor(trace, len(sources), tasks, positions, generator)
    needed = peak_bytes(trace, len(sources), batches, visitor, None, storage)
    check_memory(needed, memory, batches[0].images.device, "statistics")
    Sweep(sources, batches, None, storage).run(visitor, progress)
    return visitor.moments()
