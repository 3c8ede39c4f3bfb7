"""The sections of params.yaml of the stages that merge: one for each, of the stage's name."""

from typing import Annotated, Literal

from pydantic import Field

from stages.core.runtime.cache import Storage
from stages.core.settings.sections import Count, Positive, Precision, Ridge, Section, Whole

Spending = Literal["measured", "uniform", "prefix", "threshold"]

RIDGE = 1e-3  # of RegMean, relative to the mean diagonal of its Gram matrix
RIDGE_OF_FEW = 0.1  # of a fit to fewer images than can be held out
FitRidge = Ridge | Literal["auto"]  # auto: by images held out, layer by layer


class AllocateSection(Section):
    """``by``: measured benefits, the same fraction of every group, all groups from some stage on (prefix), or all
    units that are worth more apart than one number (threshold).

    layout: real blocks, or dense layers in which every unit may read every unit.
    """

    by: Spending = "measured"
    layout: Literal["blocks", "dense"] = "blocks"
    multiple: Annotated[int, Field(ge=1, le=64)] = 1  # of which merged widths are; 1: any width
    cost: Literal["macs", "parameters"] = "macs"
    levels: Annotated[int, Field(ge=2, le=64)] = 8  # of each group, on the solver's grid
    nodes: Count = 2000  # of the solver's search tree; a limit in time would not give the same answer twice

    @property
    def dense(self) -> bool:
        return self.layout == "dense"

    def spent(self, by: Spending | None) -> "AllocateSection":
        """The same, but for how a matching says that its budget is spent."""
        return self if by is None else self.model_copy(update={"by": by})


class FitSection(Section):
    images: Count  # per task
    batch_size: Count = 100
    ridge: FitRidge = "auto"
    positions: Annotated[float, Field(gt=0, le=1)] = 1.0
    precision: Precision = "float32"  # of the values that are kept
    storage: Storage = "auto"
    memory: Positive | None = None


class Options(Section):
    """What is rarely said in a notebook; the same settings as the stages have, once for all of them.

    images: at most so many of each task are read; None: all. seed: of what is drawn at random. ridge: relative to the
    mean diagonal of a fit's Gram matrix, or auto. positions: share of a
    feature map's positions that statistics and fit use. precision, storage: type in which
    values are kept, and where. memory: GiB; None: what the machine has free. allocate: how the budget is spent.
    """

    images: Count | None = None
    seed: Whole = 0
    ridge: FitRidge = "auto"
    positions: Annotated[float, Field(gt=0, le=1)] = 1.0
    precision: Precision = "float32"  # of the values that are kept
    storage: Storage = "auto"
    memory: Positive | None = None
    allocate: AllocateSection = AllocateSection()


class RecalibrateSection(Section):
    images: Count
    batch_size: Count = 100
    precision: Precision = "float32"  # of the values that are kept
    storage: Storage = "auto"
    memory: Positive | None = None


class ProbeSection(Section):
    batch_size: Count = 250
    test_images: Count | None = None  # per task; None: all
    linear_images: Count = 1000  # labelled images per task for the linear probes
    penalty: Annotated[float, Field(gt=0, le=1e9)] = 1e-2
    latency_batch: Annotated[int, Field(ge=1, le=2**16)] = 32
    latency_repeats: Annotated[int, Field(ge=1, le=10_000)] = 15
