"""The rows of the result table as params.yaml has them: `match`, `methods` and `full`."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.core.recipe.sections import FitRidge, Spending
from stages.core.settings.sections import Count, Fraction, Name, NonNegative, Positive, Section, Shift

Recalibrate = Literal["none", "batchnorm", "repair", "tact"]


class MatchSettings(Section):
    """How units are paired, and what is done to the shared ones beyond that.

    ``by`` a permutation: identity, weights (Git Re-Basin), activations, dual (MuDSC). By matrices: zip (ZipIt!), cca
    (CCA Merge), transport (OT Fusion).
    """

    by: Literal["identity", "weights", "activations", "dual", "zip", "cca", "transport"]
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

    @model_validator(mode="after")
    def _check(self) -> "MatchSettings":
        _check_used(self, "by", ("data", "allocate", *MATCHING_KEYS.get(self.by, ())))
        return self


MATCHING_KEYS = {  # beside those of every matching
    "weights": ("sweeps", "restarts"),
    "activations": ("similarity", "sweeps"),
    "dual": ("rho", "sweeps"),
    "zip": ("alpha", "beta"),
    "cca": ("ridge",),
    "transport": ("features", "regularisation"),
}


class Refine(Section):
    """How a fitted network is refined end to end, without labels (stages.fit.refine).

    images: at most so many calibration images of each task; all: all of them and the sources' training images, without
    their labels. batch_size: images of each task in a step. warmup: share of the steps. features: where the sources'
    values are imitated beside their outputs. joint: weight of telling separate label spaces apart. every: steps
    between two looks at the images held out; patience: how many looks in a row may bring nothing better. shift, flip:
    null, as the sources are trained.
    """

    steps: Count = 400
    images: Count | Literal["all"] = 2500
    batch_size: Count = 64
    learning_rate: Positive = 3e-3
    warmup: Fraction = 0.1
    weight_decay: NonNegative = 0.01
    features: Literal["none", "last", "stages"] = "last"
    joint: NonNegative = 1.0
    every: Count = 25
    patience: Count = 8
    shift: Shift | None = None
    flip: bool | None = None

    @property
    def most(self) -> int:
        """How many images of a task it can see."""
        return self.steps * self.batch_size


class Fit(Section):
    """How the merged layers come to be.

    ``solver``: average is no fit, exact the closed form, adam the published iteration of PLeaS, regmean RegMean, which
    has inputs: source and targets: own by definition. Only exact has an intercept to fold a batch norm into.
    """

    solver: Literal["average", "exact", "adam", "regmean"] = "exact"
    inputs: Literal["source", "merged"] = "source"
    targets: Literal["ensemble", "own"] = "ensemble"
    norm: Literal["average", "fold"] = "average"
    ridge: FitRidge | None = None
    steps: Count = 400
    learning_rate: Positive = 5e-4
    batch_size: Count = 16
    off_diagonal: Fraction = 0.9  # of regmean: what the off-diagonal entries of a Gram matrix are scaled by
    refine: Refine | None = None  # what comes after the solver

    @model_validator(mode="after")
    def _check(self) -> "Fit":
        _check_used(self, "solver", (*FIT_KEYS[self.solver], "refine"))
        return self


FIT_KEYS = {
    "average": (),
    "exact": ("inputs", "targets", "norm", "ridge"),
    "adam": ("inputs", "targets", "steps", "learning_rate", "batch_size"),
    "regmean": ("ridge", "off_diagonal"),
}


def _check_used(settings: Section, choice: str, used: Sequence[str]) -> None:
    """Refuse a setting that was given although what ``choice`` says does not use it."""
    for key in type(settings).model_fields:
        if key in settings.model_fields_set and key not in (choice, *used):
            allowed = ", ".join((choice, *used))
            raise ValueError(
                f"{key}: not a setting of {choice}: {getattr(settings, choice)}; allowed: {allowed}"
            )


class Method(Section):
    """A row of the result table: a matching, a fit and a recalibration, on the tasks' own images or a proxy's."""

    match: Name
    fit: Fit
    recalibrate: Recalibrate = "batchnorm"
    data: Literal["own", "proxy"] = "own"

    @model_validator(mode="after")
    def _check(self) -> "Method":
        if self.data == "proxy":
            if self.fit.solver == "regmean" or self.fit.targets == "own":
                raise ValueError(
                    "data: found proxy with targets: own; allowed: targets: ensemble, a proxy has no owner"
                )
            if self.recalibrate == "tact":
                raise ValueError("data: found proxy with recalibrate: tact, which is per task; allowed: own")
        return self
