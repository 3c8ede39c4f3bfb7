"""Nothing is done after the fit."""

from stages.core.recipe.rooms import RECALIBRATIONS
from stages.recalibrate.mending import Mending


@RECALIBRATIONS.register()
def leave(mending: Mending) -> None:
    """The network stays as the fit left it."""
