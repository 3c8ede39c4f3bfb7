"""Batch norms get the statistics of the merged network's own values."""

from stages.core.recipe.rooms import RECALIBRATIONS
from stages.core.sweep.exact import fingerprint
from stages.recalibrate.batchnorm import recompute_statistics
from stages.recalibrate.mending import Mending


@RECALIBRATIONS.register()
def recompute(mending: Mending) -> None:
    """Left alone where the fit has set the statistics of the same images, and the network is as it was then."""
    network, batches, precision = mending.network, mending.batches, mending.precision
    if "exact" in network.about and network.about["exact"] == fingerprint(network, batches, precision):
        return
    recompute_statistics(network, batches, precision, mending.storage, mending.memory, mending.progress)
