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
from stages.core.sweep.gram import add_gram, add_pairs, complete_gram, complete_pairs, gram_bytes
from stages.core.sweep.memory import place_values
from stages.core.sweep.rows import draw_places, place_rows, unit_rows
from stages.core.sweep.sweep import Sweep
from stages.core.units.moments import POINTS, TaskMoments
from stages.statistics.points import Feature, FeatureUnits, features

ENTRIES_AT_A_TIME = 2**22  # entries of the rows that are summed at a time


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
        pairs_only: bool = False,
    ) -> None:
        """itemsize: bytes of an entry of the values that are looked at. pairs_only: see ``gather``."""
        self.itemsize, self.pairs_only = itemsize, pairs_only
        self.trace, self.networks, self.tasks = trace, networks, tasks
        self.positions, self.generator = positions, generator
        self.features = {
            name: kept
            for name, seen in features(trace).items()
            if (kept := [own for own in seen if not (pairs_only and own.point == "before")])
        }
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
            if self.pairs_only:
                add_pairs(sums[group].second[task], part, self.networks)
            else:
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
                if self.pairs_only:
                    complete_pairs(second, self.networks)
                else:
                    complete_gram(second)
            s.mean /= s.count[:, None]
            s.second /= s.count[:, None, None]
            gathered[point][group] = TaskMoments(s.mean, s.second)
        return gathered


def _chosen(value: Tensor, dim: int, units: FeatureUnits) -> Tensor:
    if units.entries is not None:
        return value.index_select(dim, units.entries.to(value.device))
    return value.narrow(dim, units.start, units.count * units.block)


def gather(
    sources: Sequence[Source],
    batches: Sequence[Batch],
    *,
    positions: float = 1.0,
    precision: torch.dtype = torch.float32,
    storage: Storage = "memory",
    memory: float | None = None,
    generator: torch.Generator | None = None,
    pairs_only: bool = False,
    progress: str | None = None,
) -> dict[str, dict[str, TaskMoments]]:
    """Moments of every free group of the (unaligned) sources, by point and group.

    batches: unlabelled images of every task (a proxy's as one more task). positions: share of a feature map's
    positions that is used. precision, storage: type in which values are kept, and where. memory: GiB, None for what is
    free. pairs_only: no more than permutations need: nothing before the non-linearity, and among the units of one
    network only each one's energy, the rest zero. Raises InputError when it would not fit in memory, and for features
    that are not finite or whose squares are not.
    """
    trace = sources[0].trace
    generator = generator or torch.Generator().manual_seed(0)
    tasks = max(batch.task for batch in batches) + 1
    itemsize = batches[0].images.element_size()
    visitor = MomentsVisitor(trace, len(sources), tasks, positions, generator, itemsize, pairs_only)
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
