"""What is done to a merged network after the fit, by name."""

from collections.abc import Sequence

import torch

from stages.core.align.alignment import Alignment
from stages.core.graph.source import Source
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Recalibrate
from stages.core.sweep.batches import Batch
from stages.core.sweep.exact import fingerprint
from stages.recalibrate.batchnorm import recompute_statistics
from stages.recalibrate.repair import repair


def recalibrate(
    network: MergedNetwork,
    way: Recalibrate,
    batches: Sequence[Batch],
    sources: Sequence[Source] = (),
    alignment: Alignment | None = None,
    *,
    storage: torch.dtype | None = None,
    memory: float | None = None,
    progress: str | None = None,
) -> None:
    """Recalibrate ``network`` in place; ``way``: none, batchnorm, repair or tact.

    sources: units in merged order; they and the alignment are for repair and tact alone. Batch norms are left alone
    where the fit has set the statistics of the same images, and the network is as it was then.
    """
    if way == "batchnorm":
        if "exact" in network.about and network.about["exact"] == fingerprint(network, batches, storage):
            return
        recompute_statistics(network, batches, storage, memory, progress)
    elif way != "none":
        alignment = alignment or Alignment(len(sources))
        per_task = way == "tact"
        repair(
            network,
            sources,
            alignment,
            batches,
            per_task=per_task,
            storage=storage,
            memory=memory,
            progress=progress,
        )
