"""REPAIR (Jordan et al. 2023): units get back the mean and deviation they had, on the images of all tasks."""

from stages.core.recipe.rooms import RECALIBRATIONS
from stages.recalibrate.mending import Mending
from stages.recalibrate.repair import repair


@RECALIBRATIONS.register(aligned=True)
def restore(mending: Mending) -> None:
    """See stages.recalibrate.repair."""
    repair(mending, per_task=False)
