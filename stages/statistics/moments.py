"""Joint first and second moments of the networks' features, group by group and task by task, in one sweep.

A group's features are the values that Linear and Conv2d layers read of it, after the non-linearity and, apart from
that, before it. A residual stream is read at several points, which count alike.

Where the units of a group are parts (heads, groups of a convolution or a norm), the units inside them are gathered one
by one as well: which unit of one part resembles which of another, and so how alike two parts are, cannot be told from
parts as a whole. They are taken where a layer reads them; queries and keys, which none reads, where one writes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.graph.source import Source
from stages.core.graph.trace import Trace
from stages.core.runtime import ranks
from stages.core.runtime.cache import Storage
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch
from stages.core.sweep.gram import add_gram, complete_gram, gram_bytes
from stages.core.sweep.memory import place_values
from stages.core.sweep.rows import draw_places, place_rows, unit_rows
from stages.core.sweep.sweep import Sweep
from stages.core.units.groups import Axis, Inner, Span, span_index
from stages.core.units.moments import POINTS, TaskMoments

ENTRIES_AT_A_TIME = 2**22  # entries of the rows that are summed at a time
ENDS = (
    "input",
    "linear",
    "conv2d",
    "batch_norm",
    "add",
    "multiply",
    "attention",
    "matmul",
    "conv1d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "subtract",
    "divide",
)  # what non-linearities come behind


@dataclass(frozen=True)
class FeatureUnits:
    """Units of one group along a value: where they start, how many, how many entries each.

    dim: where they lie, if not on the dimension of the value's units but across it: the mean over these is looked at.
    """

    name: str
    start: int
    count: int
    block: int
    entries: Tensor | None = None  # where they are, if they do not follow each other
    dim: int | None = None


@dataclass(frozen=True)
class Feature:
    """A value that is looked at, as what (after, before, inside), and the units on it."""

    point: str
    value: str
    held: tuple[FeatureUnits, ...]


@dataclass
class _Sums:
    mean: Tensor
    second: Tensor
    count: Tensor  # (T,)


class MomentsVisitor:
    """Accumulates the moments of every free group."""

    def __init__(
        self,
        trace: Trace,
        networks: int,
        tasks: int,
        positions: float,
        generator: torch.Generator,
        itemsize: int = 4,
    ) -> None:
        """itemsize: bytes of an entry of the values that are looked at."""
        self.itemsize = itemsize
        self.trace, self.networks, self.tasks = trace, networks, tasks
        self.positions, self.generator = positions, generator
        self.features = features(trace)
        self.found: dict[tuple[str, str], _Sums] = {}  # (point, group) -> sums of the points' means

    def wants(self, node: Node) -> bool:
        return node.name in self.features

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        found: dict[tuple[str, str], int] = {}
        for name, seen in self.features.items():
            most = 0
            for feature in seen:
                sums = {(feature.point, units.name): self._sum_bytes(units) for units in feature.held}
                most = max(most, sum(found.values()) + sum(sums.values()) + self._work_bytes(feature, batch))
                found |= sums
            if name == node.name:
                return most
        return 0

    def kept_bytes(self, node: Node, images: int) -> int:
        return 0

    def _sum_bytes(self, units: FeatureUnits) -> int:
        return 8 * self.tasks * (self.networks * units.count) ** 2

    def _work_bytes(self, feature: Feature, batch: int) -> int:
        """Rows of one network after the other and side by side; a piece of them in float64, or products of them."""
        layout, own = self.trace.layouts[feature.value], self.trace.shapes[feature.value].numel()
        most = 0
        for units in feature.held:
            width = self.networks * units.count
            whole = layout.width if units.dim is None else self.trace.shapes[feature.value][units.dim]
            entries = self.networks * batch * own // whole * units.count * units.block
            most = max(
                most,
                2 * entries * self.itemsize + max(8 * min(ENTRIES_AT_A_TIME, entries), gram_bytes(width)),
            )
        return most

    def visit(self, node: Node, sweep: Sweep) -> None:
        for feature in self.features[node.name]:
            self._take(sweep, feature)

    def _take(self, sweep: Sweep, feature: Feature) -> None:
        """Sums of the units of a value over all batches."""
        sums: dict[str, _Sums] = {}
        for index, batch in enumerate(sweep.batches):
            values = [sweep.source(m, feature.value, index) for m in range(self.networks)]
            self._add(sums, self.trace.layouts[feature.value].dim, values, feature.held, batch.task)
        for group, own in sums.items():
            ranks.add_up(own.mean, own.second, own.count)
            self._count_alike((feature.point, group), own)

    def _add(
        self,
        sums: dict[str, _Sums],
        dim: int,
        values: Sequence[Tensor],
        held: Sequence[FeatureUnits],
        task: int,
    ) -> None:
        for units in held:
            along = dim if units.dim is None else units.dim
            if units.dim is not None:  # the units that they lie across have another order in each network
                values = [v.mean(dim, keepdim=True) for v in values]
            own = [_chosen(v, along, units) for v in values]
            rows = torch.cat([unit_rows(v, along, units.block) for v in own], 1)
            places = len(rows) // len(values[0])
            if self.positions < 1 and places > 1:
                drawn = draw_places(len(values[0]), places, self.positions, self.generator)
                rows = rows[place_rows(drawn, places).to(rows.device)]
            self._sum(sums, units.name, rows, task)

    def _sum(self, sums: dict[str, _Sums], group: str, rows: Tensor, task: int) -> None:
        """rows: (rows, N d)."""
        d = rows.shape[1]
        if group not in sums:
            sums[group] = self._zeros(d, rows.device)
        for part in rows.split(max(1, ENTRIES_AT_A_TIME // d)):
            sums[group].mean[task] += part.sum(0).double()
            add_gram(sums[group].second[task], part, 1.0)
            sums[group].count[task] += len(part)

    def _count_alike(self, key: tuple[str, str], own: _Sums) -> None:
        own.mean /= own.count[:, None]
        own.second /= own.count[:, None, None]
        if key not in self.found:
            self.found[key] = _Sums(own.mean, own.second, torch.ones_like(own.count))
            return
        self.found[key].mean += own.mean
        self.found[key].second += own.second
        self.found[key].count += 1

    def _zeros(self, d: int, device: torch.device) -> _Sums:
        shapes = (self.tasks, d), (self.tasks, d, d), (self.tasks,)
        return _Sums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def moments(self) -> dict[str, dict[str, TaskMoments]]:
        """What was found, once: the sums become the moments."""
        gathered: dict[str, dict[str, TaskMoments]] = {point: {} for point in POINTS}
        for point, group in list(self.found):
            s = self.found.pop((point, group))
            for second in s.second:
                complete_gram(second)
            s.mean /= s.count[:, None]
            s.second /= s.count[:, None, None]
            gathered[point][group] = TaskMoments(s.mean, s.second)
        return gathered


def features(trace: Trace) -> dict[str, list[Feature]]:
    """All that is looked at, by the node that is visited then, in the order of the graph."""
    at, inside = points(trace), points_inside(trace)
    found = dict[str, list[Feature]]()
    for node in trace.graph.nodes:
        own = [Feature(point, value, _held(trace, value)) for point, value in at.get(node.name, ())]
        for value, inner, span in inside.get(node.name, ()):
            count = inner.parts * inner.size
            index = span_index(torch.arange(count), span) if span.entries else None
            across = node.attributes["dim"] if node.operation == "mix" else None
            units = FeatureUnits(inner.name, span.start, count, span.block, index, across)
            own.append(Feature("inside", value, (units,)))
        if own:
            found[node.name] = own
    return found


def _held(trace: Trace, value: str) -> tuple[FeatureUnits, ...]:
    """The free groups along a value."""
    layout, held = trace.layouts[value], list[FeatureUnits]()
    for name in dict.fromkeys(s.group for s in layout.segments if s.group in trace.spec.free):
        size = trace.spec.free[name].size
        for index in layout.places(name, size):
            start = int(index[0])
            follows = torch.equal(index, torch.arange(start, start + len(index)))
            held.append(FeatureUnits(name, start, size, len(index) // size, None if follows else index))
    return tuple(sorted(held, key=lambda units: units.start))


def _chosen(value: Tensor, dim: int, units: FeatureUnits) -> Tensor:
    if units.entries is not None:
        return value.index_select(dim, units.entries.to(value.device))
    return value.narrow(dim, units.start, units.count * units.block)


def points(trace: Trace) -> dict[str, list[tuple[str, str]]]:
    """Where features are taken: {node that is visited: (point, value)}. Every free group has one of each point."""
    at: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    covered: set[str] = set()
    here = {node.name: {units.name for units in _held(trace, node.name)} for node in trace.graph.nodes}
    for node in trace.graph.nodes:
        if node.linear and node.inputs[0] not in seen:
            seen.add(node.inputs[0])
            groups = here[node.inputs[0]]
            if groups:
                covered |= groups
                at.setdefault(node.name, []).append(("after", node.inputs[0]))
    for node in trace.graph.nodes:  # a group that no layer reads: what its layers write
        written = here[node.name]
        if (node.linear or node.grouped or node.operation == "embedding") and written - covered:
            covered |= written
            seen.add(node.name)
            at.setdefault(node.name, []).append(("after", node.name))
    nodes = {node.name: node for node in trace.graph.nodes}
    known: dict[str, set[str]] = {}
    before = {name for value in seen for name in _before(nodes, value, known) if here[name]}
    left = set(trace.spec.free) - set[str]().union(*(here[name] for name in before))
    for node in trace.graph.nodes:  # a group that no such value holds: the first that does
        if here[node.name] & left:
            before.add(node.name)
            left -= here[node.name]
    for name in sorted(before):
        at.setdefault(name, []).append(("before", name))
    return at


def points_inside(trace: Trace) -> dict[str, list[tuple[str, Inner, Span]]]:
    """The same for units inside parts: {node that is visited: (value, units, where they lie on it)}."""
    at: dict[str, list[tuple[str, Inner, Span]]] = {}
    maps = [node for node in trace.graph.nodes if node.fitted or node.operation == "mix"]
    for inner in _single_units(trace):
        read, written = list[tuple[str, str, Span]](), list[tuple[str, str, Span]]()
        for node in maps:
            weight, reads = node.parameters["weight"], 0 if node.transposed else 1
            for span in inner.spans:
                if span.axis == Axis(weight, reads):
                    read.append((node.name, node.inputs[0], span))
                elif span.axis == Axis(weight, 1 - reads):
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


def _before(nodes: dict[str, Node], value: str, known: dict[str, set[str]]) -> set[str]:
    """The values in front of the non-linearity (and pooling) that give ``value``."""
    if value not in known:
        node = nodes[value]
        end = node.operation in ENDS
        known[value] = {value} if end else set().union(*(_before(nodes, name, known) for name in node.inputs))
    return known[value]


def gather(
    sources: Sequence[Source],
    batches: Sequence[Batch],
    *,
    positions: float = 1.0,
    precision: torch.dtype = torch.float32,
    storage: Storage = "memory",
    memory: float | None = None,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, TaskMoments]]:
    """Moments of every free group of the (unaligned) sources, by point and group.

    batches: unlabelled images of every task (a proxy's as one more task). positions: share of a feature map's
    positions that is used. precision, storage: type in which values are kept, and where. memory: GiB, None for what is
    free. Raises InputError when it would not fit in memory, and for features that are not finite or whose squares are
    not.
    """
    trace = sources[0].trace
    generator = generator or torch.Generator().manual_seed(0)
    tasks = max(batch.task for batch in batches) + 1
    itemsize = batches[0].images.element_size()
    visitor = MomentsVisitor(trace, len(sources), tasks, positions, generator, itemsize)
    sweep = Sweep(sources, batches, None, precision)
    place_values(sweep, visitor, storage, memory, "statistics")
    sweep.run(visitor, progress)
    found = visitor.moments()
    for groups in found.values():
        for name, moments in groups.items():
            if not bool(moments.second.isfinite().all()):
                raise InputError(
                    f"statistics: group {name}: features whose squares are not finite; allowed: images and weights of "
                    "the size that the networks were trained with"
                )
    return found
