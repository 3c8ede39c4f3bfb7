"""What a file of stages/fit/solvers gives: how a layer is fitted, and what that takes."""

from typing import NamedTuple, Protocol

from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution


class Solver(Protocol):
    """How one layer is fitted."""

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        """What it holds, beside the values that the sweep keeps; ``batch``: the most images that are worked with."""
        ...

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        """Fit the layer and install its weights; None where there is nothing to fit."""
        ...


class LayerSolvers(NamedTuple):
    """For layers whose outputs read all inputs, and for grouped convolutions; None: they stay the average."""

    dense: Solver | None = None
    grouped: Solver | None = None
