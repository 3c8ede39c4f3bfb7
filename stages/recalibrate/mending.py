"""What a recalibration has to go by: every file of stages/recalibrate/ways is given this."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.core.align.alignment import Alignment
from stages.core.graph.source import Source
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.cache import Storage
from stages.core.sweep.batches import Batch


@dataclass(frozen=True)
class Mending:
    """A merged ``network`` to be mended in place, and unlabelled images of every task.

    sources: units in merged order; they and the alignment are there for ways that are registered as ``aligned``.
    precision, storage, memory, progress: as of a sweep.
    """

    network: MergedNetwork
    batches: Sequence[Batch]
    sources: Sequence[Source] = ()
    alignment: Alignment | None = None
    precision: torch.dtype | None = None
    storage: Storage = "memory"
    memory: float | None = None
    progress: str | None = None
