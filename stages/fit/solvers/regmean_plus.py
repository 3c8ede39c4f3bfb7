"""RegMean++ (arXiv 2508.03121): RegMean on what the merged network really gives its layers.

W = (sum_t G_t)^-1 sum_t G_t W_t^T with G_t the Gram matrix of the merged network's own inputs, as built so far, on the
images of task t. Of one layer it is RegMean.
"""

from stages.core.recipe.rooms import SOLVERS
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.solvers.regmean import RegMean


@SOLVERS.register(uses=("ridge", "off_diagonal"), always={"inputs": "merged", "targets": "own"})
def regmean_plus(setup: Setup) -> LayerSolvers:
    """Grouped convolutions stay the average."""
    return LayerSolvers(RegMean(setup))
