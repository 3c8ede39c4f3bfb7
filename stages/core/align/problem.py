"""What an alignment of shared units is computed from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from stages.core.align.alignment import Alignment, GroupAlignment
from stages.core.graph.source import Source
from stages.core.units.moments import Moments, Statistics


@dataclass(frozen=True)
class Problem:
    """The shared units of N sources, paired by a matching.

    sources: units in merged order, shared ones first. shared: k of each free group. after, before: moments of the
    shared units of every group that has some, networks side by side, in that order (see stages.core.units.moments).
    """

    sources: Sequence[Source]
    shared: Mapping[str, int]
    after: Mapping[str, Moments]
    before: Mapping[str, Moments]

    @property
    def networks(self) -> int:
        return len(self.sources)

    def correlations(self, group: str) -> tuple[Tensor, ...]:
        """Of each network's own shared units, (k, k)."""
        moments = self.after[group]
        whole = moments.similarity("correlation")
        return tuple(moments.block(whole, m, m) for m in range(self.networks))

    def each(
        self, solve: Callable[[Moments], tuple[Sequence[Tensor], Sequence[Tensor], Tensor]]
    ) -> Alignment:
        """An alignment that looks at one group at a time: ``solve(moments)`` gives (views, unmerges, weights)."""
        groups = {}
        for name, moments in self.after.items():
            views, unmerges, weights = solve(moments)
            groups[name] = GroupAlignment(tuple(views), tuple(unmerges), weights, self.correlations(name))
        return Alignment(self.networks, groups)


def make_problem(
    sources: Sequence[Source], statistics: Statistics, units: Mapping[str, Tensor], shared: Mapping[str, int]
) -> Problem:
    """sources: units in merged order. units {group: int64 (N, d)}: where each of them was before."""

    def chosen(moments: Mapping[str, Moments]) -> dict[str, Moments]:
        return {g: moments[g].select(units[g][:, :k].cpu()) for g, k in shared.items() if k}

    return Problem(sources, shared, chosen(statistics.after), chosen(statistics.before))
