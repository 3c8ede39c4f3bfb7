"""TACT: units get back the mean and deviation they had, for each task those of its own network."""

from stages.core.recipe.rooms import RECALIBRATIONS
from stages.recalibrate.mending import Mending
from stages.recalibrate.repair import repair


@RECALIBRATIONS.register(aligned=True, owned=True)
def restore_by_task(mending: Mending) -> None:
    """See stages.recalibrate.repair."""
    repair(mending, per_task=True)
