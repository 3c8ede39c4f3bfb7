"""What is done to a merged network after the fit, by name."""

from collections.abc import Sequence
from typing import Any

from stages.core.align.alignment import Alignment
from stages.core.graph.source import Source
from stages.core.merged.network import MergedNetwork
from stages.core.merged.ranges import check_values
from stages.core.recipe.rooms import RECALIBRATIONS
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch
from stages.recalibrate.mending import Mending


def recalibrate(
    network: MergedNetwork,
    way: str,
    batches: Sequence[Batch],
    sources: Sequence[Source] = (),
    alignment: Alignment | None = None,
    **sweep: Any,
) -> None:
    """Recalibrate ``network`` in place; ``way``: a file of stages/recalibrate/ways.

    sources: units in merged order; they and the alignment are for ways that are ``aligned``. sweep: precision,
    storage, memory and progress. Raises InputError where what comes out is not finite.
    """
    RECALIBRATIONS.way(way).make(Mending(network, batches, sources, alignment, **sweep))
    try:
        check_values(network.state_dict())
    except InputError as error:
        raise InputError(
            f"recalibrate: {way} gives no numbers: {error}; are images or weights huge?"
        ) from error
