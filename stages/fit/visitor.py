"""Layer-wise fitting inside a sweep: PLeaS, RegMean and progressive as settings of one least-squares problem.

At every linear map the merged layer is fitted on all images, installed, and the sweep goes on, so that a
later layer sees what the earlier ones really give (``inputs: merged``) or what the sources give (``inputs: source``).
"""

from dataclasses import dataclass
from typing import Protocol

from stages.core.graph.nodes import Node
from stages.core.sweep.norms import moments_bytes
from stages.core.sweep.sweep import Sweep
from stages.fit.intercepts import Intercepts
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solvers.adam import Adam
from stages.fit.solvers.dense import Dense
from stages.fit.solvers.grouped import Grouped
from stages.fit.solvers.mixing import Mixing
from stages.fit.solvers.regmean import RegMean


@dataclass
class LayerFit:
    """One line of the record: relative residual energy of a layer's fit, and the ridge that it was solved with."""

    layer: str
    residual: float
    ridge: float | None


class Solver(Protocol):
    """How one layer is fitted."""

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        """What it holds, beside the values that the sweep keeps; ``batch``: the most images that are worked with."""
        ...

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        """Fit the layer and install its weights; None where there is nothing to fit."""
        ...


class FitVisitor:
    """Fits each layer of a merged network. After the sweep ``record`` has one entry per fitted layer."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.record: list[LayerFit] = []
        self._intercepts = Intercepts(setup)
        self._solvers = solvers(setup)
        self._mixing = Mixing(setup) if setup.fit.solver == "exact" else None

    def wants(self, node: Node) -> bool:
        if node.operation == "mix":
            return self._mixing is not None and self._mixing.wants(node)
        if node.fitted:
            return self._solver(node) is not None
        return node.operation == "batch_norm" and self.setup.fit.inputs == "merged"

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        if node.operation == "mix":
            return self._mixing.bytes(node, batch)
        if not node.fitted:
            return moments_bytes(self.setup.network, node, batch)
        return self._solver(node).bytes(Layer(self.setup, node), images, batch)

    def visit(self, node: Node, sweep: Sweep) -> None:
        if node.operation == "mix":
            name = node.parameters["weight"].rpartition(".")[0] or node.name
            self._note(name, self._mixing.fit(node, sweep))
            return
        if not node.fitted:
            self._intercepts.set_statistics(node, sweep)
            return
        layer = Layer(self.setup, node)
        found = self._solver(node).fit(LayerProblem(layer, sweep))
        if found is not None:
            self._intercepts.install(layer, found)
            self._note(layer.name, found)

    def _note(self, name: str, found: LayerSolution) -> None:
        residual = found.residual / found.energy if found.energy > 0 else 0.0
        self.record.append(LayerFit(name, residual, found.ridge))

    def _solver(self, node: Node) -> Solver | None:
        return self._solvers[node.grouped]


def solvers(setup: Setup) -> dict[bool, Solver | None]:
    """For layers whose outputs read all inputs (False) and for grouped ones (True); None: they stay the average."""
    if setup.fit.solver == "regmean":
        return {False: RegMean(setup), True: None}
    if setup.fit.solver == "adam":
        return {False: Adam(), True: Adam()}
    return {False: Dense(), True: Grouped()}
