"""Batch-norm recomputation: the statistics of the merged network's own values on unlabelled images.

Merging changes the variance of every unit (Jordan et al. 2023, REPAIR), so the sources' statistics no longer fit.
One pass of all images sets the mean and variance of each batch norm, in order, from what the network before it
gives with its new statistics: the cumulative average over one full pass, without the noise of single batches.
"""

from collections.abc import Sequence

import torch

from stages.core.graph.nodes import Node
from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.sweep.batches import Batch
from stages.core.sweep.memory import check_memory, peak_bytes
from stages.core.sweep.norms import install_statistics, merged_moments, moments_bytes
from stages.core.sweep.sweep import Sweep


class _Statistics:
    def __init__(self, network: MergedNetwork) -> None:
        self.network = network
        self.exact = exact_entries(network)

    def wants(self, node: Node) -> bool:
        return node.operation == "batch_norm"

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        return moments_bytes(self.network, node, batch)

    def visit(self, node: Node, sweep: Sweep) -> None:
        moments = merged_moments(node, sweep)
        install_statistics(self.network.map_of(node), moments, ~self.exact[node.name].to(moments.device))


def recompute_statistics(
    network: MergedNetwork,
    batches: Sequence[Batch],
    storage: torch.dtype | None = None,
    memory: float | None = None,
    progress: str | None = None,
) -> None:
    """Reset and recompute every batch norm of ``network``, in place.

    batches: unlabelled images of every task, which weigh alike. Entries that are copies of a source's keep its
    statistics: they were trained with them. Raises InputError when it would not fit in memory.
    """
    visitor = _Statistics(network)
    sweep = Sweep([], batches, network, storage)
    check_memory(peak_bytes(sweep, visitor), memory, sweep.device, "recalibrate")
    sweep.run(visitor, progress)
