"""The rows of the result table as params.yaml has them: `match`, `methods` and `full`."""

from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from stages.core.recipe.sections import FitRidge, Spending
from stages.core.runtime.errors import InputError
from stages.core.settings.params import first_line
from stages.core.settings.sections import Count, Fraction, Name, NonNegative, Positive, Section, Shift

Settings = TypeVar("Settings", bound=Section)


class Open(Section):
    """A section that names a way of doing something, whose file says which settings it uses.

    The fields are the settings that several ways share; others are the way's own (``own``), kept as they are.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    def own(self, kind: type[Settings]) -> Settings:
        """The settings that are no fields here, checked. Raises InputError in one line."""
        try:
            return kind.model_validate(self.model_extra)
        except ValidationError as error:
            raise InputError(first_line(error, kind)) from error


class MatchSettings(Open):
    """How units are paired, and what is done to the shared ones beyond that.

    ``by``: a file of stages/match/ways (a permutation) or of stages/core/align/ways (matrices).
    """

    by: Name
    data: Literal["own", "proxy"] = "own"  # whose images the activations are of
    allocate: Spending | None = None  # null: allocate.by
    similarity: Literal["distance", "inner", "correlation"] = "distance"
    sweeps: Count = 100
    restarts: Count = 1
    rho: Fraction = 0.5  # of the weights; the rest is of the activations
    alpha: Annotated[float, Field(gt=0, le=1)] = 1e-4
    beta: Fraction = 0.075
    ridge: Positive = 0.1
    features: Literal["weights", "activations"] = "activations"
    regularisation: NonNegative = 0.0  # 0: exact transport


class Refine(Section):
    """How a fitted network is refined end to end, without labels (stages.fit.refine).

    images: at most so many calibration images of each task; all: all of them and the sources' training images, without
    their labels. batch_size: images of each task in a step. optimizer: see stages.fit.optimizers; adamw is used with a
    learning rate of about 3e-3. warmup: share of the steps. features: where the sources' values are imitated beside
    their outputs. joint: weight of telling separate label spaces apart. every: steps between two looks at the images
    held out; patience: how many looks in a row may bring nothing better. shift, flip: null, as the sources are trained.
    """

    steps: Count = 800
    images: Count | Literal["all"] = 2500
    batch_size: Count = 64
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 5e-3
    warmup: Fraction = 0.1
    weight_decay: NonNegative = 0.01
    features: Literal["none", "last", "stages"] = "stages"
    joint: NonNegative = 1.0
    every: Count = 25
    patience: Count = 8
    shift: Shift | None = None
    flip: bool | None = None

    @property
    def most(self) -> int:
        """How many images of a task it can see."""
        return self.steps * self.batch_size


class Fit(Open):
    """How the merged layers come to be.

    ``solver``: a file of stages/fit/solvers; average is no fit, exact the closed form, adam the published iteration of
    PLeaS, regmean RegMean. Only exact has an intercept to fold a batch norm into.
    """

    solver: Name = "exact"
    inputs: Literal["source", "merged"] = "source"
    targets: Literal["ensemble", "own"] = "ensemble"
    norm: Literal["average", "fold"] = "average"
    ridge: FitRidge | None = None
    steps: Count = 400
    learning_rate: Positive = 5e-4
    batch_size: Count = 16
    off_diagonal: Fraction = 0.9  # of regmean: what the off-diagonal entries of a Gram matrix are scaled by
    refine: Refine | None = None  # what comes after the solver


class Method(Section):
    """A row of the result table: a matching, a fit and a recalibration, on the tasks' own images or a proxy's.

    ``recalibrate``: a file of stages/recalibrate/ways.
    """

    match: Name
    fit: Fit
    recalibrate: Name = "batchnorm"
    data: Literal["own", "proxy"] = "own"
