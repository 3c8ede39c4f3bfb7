"""Batch-norm recomputation: the statistics of the merged network's own values on unlabelled images.

Merging changes the variance of every unit (Jordan et al. 2023, REPAIR), so the sources' statistics no longer fit.
One pass of all images sets the mean and variance of each batch norm, in order, from what the network before it
gives with its new statistics: the cumulative average over one full pass, without the noise of single batches.
"""

from collections.abc import Sequence

import torch

from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.cache import Storage
from stages.core.sweep.batches import Batch
from stages.core.sweep.norms import set_statistics


def recompute_statistics(
    network: MergedNetwork,
    batches: Sequence[Batch],
    precision: torch.dtype | None = None,
    storage: Storage = "memory",
    memory: float | None = None,
    progress: str | None = None,
) -> None:
    """Reset and recompute every batch norm of ``network``, in place.

    batches: unlabelled images of every task, which weigh alike. Entries that are copies of a source's keep its
    statistics: they were trained with them. Raises InputError when it would not fit in memory.
    """
    set_statistics(network, exact_entries(network), batches, precision, storage, memory, progress)
