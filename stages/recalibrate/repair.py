"""REPAIR (Jordan et al. 2023) and its task-specific form TACT: units get back the mean and deviation they had.

After merging, a unit's values have another mean and, mostly, a smaller deviation than the units it stands for. In
one sweep every linear map but the last, or the batch norm behind it, gets the share-weighted average of the sources'
means and deviations on their own task's images, each seen through its alignment: for all images together and folded
into the weights (``repair``), or for each task those of its own network alone, kept beside the weights (``tact``).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stages.core.align.alignment import Alignment
from stages.core.graph.folding import exclusive_norms
from stages.core.graph.nodes import Node
from stages.core.graph.source import Source
from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.sweep.memory import place_values
from stages.core.sweep.norms import install_statistics, merged_moments, moments_bytes, moments_of
from stages.core.sweep.sweep import Sweep
from stages.recalibrate.mending import Mending

TINY = 1e-6  # of a goal's deviation: below it a unit counts as constant


class _Repair:
    """The visitor. It looks at each watched node after the sources, before the merged network runs on."""

    def __init__(
        self,
        network: MergedNetwork,
        sources: Sequence[Source],
        alignment: Alignment,
        per_task: bool,
        owned: bool,
    ) -> None:
        self.network, self.sources, self.alignment, self.per_task = network, sources, alignment, per_task
        self.owned = owned
        self.exact = exact_entries(network)
        norms = exclusive_norms(network.trace.graph)
        self.watched = {
            node.name
            for node in network.trace.graph.nodes
            if node.operation == "batch_norm"
            or (node.fitted and node.name not in norms and node.name not in network.trace.graph.logits)
        }

    def wants(self, node: Node) -> bool:
        return node.name in self.watched

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        own = max(self.network.entries(name) for name in (node.inputs[0], node.name))
        return moments_bytes(self.network, node, batch) + 8 * batch * own  # and the values themselves

    def kept_bytes(self, node: Node, images: int) -> int:
        return 0

    def visit(self, node: Node, sweep: Sweep) -> None:
        if node.operation == "batch_norm":  # first the statistics of what it reads now
            moments = merged_moments(node, sweep)
            install_statistics(self.network.map_of(node), moments, self._free(node).to(moments.device))
        tasks = range(len(self.sources)) if self.per_task else (None,)
        found = [self._goal_and_own(node, sweep, task) for task in tasks]
        if self.per_task:
            self._correct(node, found)
        else:
            self._fold(node, *found[0])

    def _free(self, node: Node) -> Tensor:
        return ~self.exact[node.name]

    def _goal_and_own(self, node: Node, sweep: Sweep, task: int | None) -> tuple[Tensor, Tensor]:
        """(mean, deviation) that a merged unit should have and those it has: (2, merged width) each."""
        trace, shared = self.network.trace, self.network.shared
        layout, arrangement = trace.layouts[node.name], self.network.arrangement(node.name)
        shares = self.alignment.shares(layout, shared, sweep.batches[0].images.double())
        goal = shares.new_zeros(2, arrangement.width)
        for m, positions in enumerate(arrangement.positions):
            view = lambda index, m=m: self.alignment.view(  # noqa: E731
                sweep.source(m, node.name, index), layout, layout.dim, shared, m
            )
            share, seen = shares[m], (m if self.owned else None) if task is None else task
            if task is not None:  # the task's own network knows, where it has a part in the unit
                expert = (arrangement.owner[positions] < 0).to(share.device) & (shares[task] > 0)
                share = torch.where(expert, float(m == task), share)
            goal.index_add_(1, positions.to(goal.device), _deviations(sweep, view, layout.dim, seen) * share)
        now = lambda index: self.network.run_node(node, [sweep.of_merged(node.inputs[0], index)])  # noqa: E731
        return goal, _deviations(sweep, now, layout.dim, task)

    def _scale_and_shift(self, node: Node, goal: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        free = self._free(node).to(own.device)
        alive = free & (own[1] > TINY * goal[1])
        scale = torch.where(alive, goal[1] / own[1].clamp(min=1e-30), 1.0)
        shift = torch.where(free, goal[0] - scale * own[0], 0.0)
        return scale, shift

    def _correct(self, node: Node, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        pairs = [torch.stack(self._scale_and_shift(node, goal, own)) for goal, own in found]
        example = next(self.network.parameters())
        self.network.set_correction(node, torch.stack(pairs, 1).to(example))

    @torch.no_grad()
    def _fold(self, node: Node, goal: Tensor, own: Tensor) -> None:
        module = self.network.map_of(node)
        scale, shift = self._scale_and_shift(node, goal, own)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                module.weight.mul_(scale.to(module.weight))
                module.bias.mul_(scale.to(module.bias)).add_(shift.to(module.bias))
            return
        for block, weight in zip(module.blocks, module.weights, strict=True):
            rows = scale[block.start : block.stop].to(weight)
            weight.mul_(rows.view(-1, *[1] * (weight.dim() - 1)))
        if module.bias is not None:  # without one, the deviation alone can be mended
            module.bias.mul_(scale.to(module.bias)).add_(shift.to(module.bias))


def _deviations(sweep: Sweep, value: Callable[[int], Tensor], dim: int, task: int | None) -> Tensor:
    """Mean and standard deviation: (2, width)."""
    mean, variance = moments_of(sweep, value, dim, task)
    return torch.stack([mean, variance.sqrt()])


def repair(mending: Mending, per_task: bool = False) -> None:
    """Restore means and deviations of a network, in place; networks without norm layers too.

    per_task: TACT; the network must be told the task from then on. Entries that are copies of a source's are left
    alone, as is the last layer. Raises InputError when it would not fit in memory.
    """
    alignment = mending.alignment or Alignment(len(mending.sources))
    owned = all(batch.task >= 0 for batch in mending.batches)
    visitor = _Repair(mending.network, mending.sources, alignment, per_task, owned)
    sweep = Sweep(mending.sources, mending.batches, mending.network, mending.precision)
    place_values(sweep, visitor, mending.storage, mending.memory, "recalibrate")
    sweep.run(visitor, mending.progress)
