"""What a file of stages/fit/solvers gives: how a layer is fitted, and what that takes."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.sweep.sweep import Sweep
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution


class NodeSolver(Protocol):
    """How a linear map over positions is fitted."""

    def wants(self, node: Node) -> bool:
        """Whether there is anything to fit."""
        ...

    def bytes(self, node: Node, batch: int) -> int:
        """What it holds, beside the values that the sweep keeps."""
        ...

    def fit(self, node: Node, sweep: Sweep) -> LayerSolution | None:
        """Fit the map and install its weights; on rank 0 at least."""
        ...


class Solver(Protocol):
    """How one layer is fitted.

    One that sums over the images of all ranks says ``over_ranks = True``. One that has the sweep keep something of all
    images (``LayerProblem.keep``) has ``kept_bytes(layer, images)`` besides.
    """

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        """What it holds, beside the values that the sweep keeps; ``batch``: the most images that are worked with."""
        ...

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        """Fit the layer and install its weights, on rank 0 at least; None where there is nothing to fit."""
        ...


class WholeSolver(Protocol):
    """How a network is fitted as a whole. images: at most so many of each task, the first ones."""

    images: int

    def bytes(self) -> int:
        """What it holds at most."""
        ...

    def fit(self, images: Sequence[Tensor], progress: str | None = None) -> LayerSolution | None:
        """Fit on images of each task, (n, ...), and install all weights; batch norms keep the statistics they have."""
        ...


class LayerSolvers(NamedTuple):
    """For layers whose outputs read all inputs, for grouped convolutions and for linear maps over positions; or for the
    network as a whole.

    None: they stay the average.
    """

    dense: Solver | None = None
    grouped: Solver | None = None
    mixing: NodeSolver | None = None
    whole: WholeSolver | None = None
