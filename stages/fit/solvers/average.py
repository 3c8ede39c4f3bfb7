"""No fit: every layer is the average of the sources' aligned weights (stages.fit.average)."""

from stages.core.recipe.rooms import SOLVERS
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers


@SOLVERS.register()
def average(setup: Setup) -> LayerSolvers:
    """Nothing is solved."""
    return LayerSolvers()
