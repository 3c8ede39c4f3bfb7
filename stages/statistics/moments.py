"""Joint first and second moments of the networks' features, group by group and task by task, in one sweep.

A group's features are the values that Linear and Conv2d layers read of it (after the non-linearity); a residual
stream is read at several places, which count alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.core.graph import Node
from stages.core.layers import unit_rows
from stages.core.network import Source
from stages.core.sweep import Batch, Sweep, check_memory, peak_bytes
from stages.core.trace import Trace

CHUNK = 2**24


@dataclass(frozen=True)
class Moments:
    """Of one group, over the images of each of T tasks: mean (T, N d), second (T, N d, N d), both float64."""

    mean: Tensor
    second: Tensor


@dataclass
class _Sums:
    mean: Tensor
    second: Tensor
    count: Tensor
    values: list[str] = field(default_factory=list)


class MomentsVisitor:
    """Accumulates the moments of every free group."""

    def __init__(
        self, trace: Trace, networks: int, tasks: int, positions: float, generator: torch.Generator
    ) -> None:
        self.trace, self.networks, self.tasks = trace, networks, tasks
        self.positions, self.generator = positions, generator
        self.at = places(trace)
        self.sums: dict[str, _Sums] = {}

    def wants(self, node: Node) -> bool:
        return node.name in self.at

    def extra_bytes(self, node: Node, images: int) -> int:
        return sum(24 * (self.networks * g.size) ** 2 for g in self.trace.spec.free.values()) + 12 * CHUNK

    def visit(self, node: Node, sweep: Sweep) -> None:
        for name in self.at[node.name]:
            for index, batch in enumerate(sweep.batches):
                values = [sweep.source(m, name, index) for m in range(self.networks)]
                self._add(name, values, batch.task)

    def _add(self, name: str, values: Sequence[Tensor], task: int) -> None:
        layout = self.trace.layouts[name]
        start = 0
        for segment in layout.segments:
            width = segment.size * segment.block
            if segment.group in self.trace.spec.free:
                own = [v.narrow(layout.dim, start, width) for v in values]
                rows = torch.cat([unit_rows(v, layout.dim, segment.block) for v in own], 1)
                if self.positions < 1 and len(rows) > len(values[0]):
                    count = max(1, round(self.positions * len(rows)))
                    rows = rows[torch.randperm(len(rows), generator=self.generator)[:count].to(rows.device)]
                self._sum(segment.group, rows, task)
            start += width

    def _sum(self, group: str, rows: Tensor, task: int) -> None:
        """rows: (rows, N d)."""
        d = rows.shape[1]
        if group not in self.sums:
            options = {"dtype": torch.float64, "device": rows.device}
            self.sums[group] = _Sums(
                torch.zeros(self.tasks, d, **options),
                torch.zeros(self.tasks, d, d, **options),
                torch.zeros(self.tasks, **options),
            )
        sums = self.sums[group]
        for part in rows.split(max(1, CHUNK // d)):
            sums.mean[task] += part.sum(0, dtype=torch.float64)
            sums.second[task] += (part.T @ part).double()
            sums.count[task] += len(part)

    def moments(self) -> dict[str, Moments]:
        return {
            name: Moments(s.mean / s.count[:, None], s.second / s.count[:, None, None])
            for name, s in self.sums.items()
        }


def places(trace: Trace) -> dict[str, list[str]]:
    """Where features are taken: {node that is visited: values}. Every free group has at least one."""
    at: dict[str, list[str]] = {}
    seen: set[str] = set()
    covered: set[str] = set()
    for node in trace.graph.nodes:
        if node.linear and node.inputs[0] not in seen:
            seen.add(node.inputs[0])
            groups = {s.group for s in trace.layouts[node.inputs[0]].segments} & set(trace.spec.free)
            if groups:
                covered |= groups
                at.setdefault(node.name, []).append(node.inputs[0])
    for node in trace.graph.nodes:  # a group that no layer reads: what its layers write
        written = {s.group for s in trace.layouts[node.name].segments} & set(trace.spec.free)
        if node.linear and written - covered:
            at.setdefault(node.name, []).append(node.name)
    return at


def gather(
    sources: Sequence[Source],
    batches: Sequence[Batch],
    *,
    positions: float = 1.0,
    storage: torch.dtype = torch.float32,
    memory: float | None = None,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> Mapping[str, Moments]:
    """Moments of every free group of the (unaligned) sources.

    batches: unlabelled images of every task. positions: share of a feature map's positions that is used. memory:
    GiB, None for what is free. Raises InputError when it would not fit in memory.
    """
    trace = sources[0].trace
    generator = generator or torch.Generator().manual_seed(0)
    tasks = max(batch.task for batch in batches) + 1
    visitor = MomentsVisitor(trace, len(sources), tasks, positions, generator)
    needed = peak_bytes(trace, len(sources), batches, visitor, None, storage)
    check_memory(needed, memory, batches[0].images.device, "statistics")
    Sweep(sources, batches, None, storage).run(visitor, progress)
    return visitor.moments()
