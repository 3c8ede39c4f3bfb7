"""Layer-wise fitting inside a sweep: PLeaS, RegMean and progressive as settings of one least-squares problem.

At every linear map the merged layer is fitted on all images, installed, and the sweep goes on, so that a
later layer sees what the earlier ones really give (``inputs: merged``) or what the sources give (``inputs: source``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.recipe.rooms import SOLVERS
from stages.core.recipe.sections import RIDGE
from stages.core.runtime import ranks
from stages.core.runtime.errors import InputError
from stages.core.sweep.norms import moments_bytes
from stages.core.sweep.sweep import Sweep
from stages.fit.intercepts import Intercepts
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers, NodeSolver, Solver, WholeSolver


@dataclass
class LayerFit:
    """One line of the record: relative residual energy of a layer's fit, and the ridge that it was solved with."""

    layer: str
    residual: float
    ridge: float | None


class FitVisitor:
    """Fits each layer of a merged network. After the sweep ``record`` has one entry per fitted layer."""

    def __init__(self, setup: Setup) -> None:
        way = SOLVERS.way(setup.fit.solver)
        fixed, ridge = dict(way.always), setup.ridge
        if not way.chooses_ridge:
            fixed["ridge"] = None if setup.fit.ridge == "auto" else setup.fit.ridge
            ridge = RIDGE if ridge == "auto" else ridge
        fit = setup.fit.model_copy(update=fixed)
        self.setup = setup = replace(setup, fit=fit, ridge=ridge)
        self.record: list[LayerFit] = []
        self._intercepts = Intercepts(setup)
        self._solvers: LayerSolvers = way.make(setup)

    @property
    def fits(self) -> bool:
        """Whether there is anything to do."""
        return any(self._solvers)

    @property
    def whole(self) -> WholeSolver | None:
        """What fits the network without going from layer to layer."""
        return self._solvers.whole

    def fit_whole(self, images: Sequence[Tensor], progress: str | None) -> None:
        """Fit the network at once. images: of each task."""
        if ranks.count() > 1:
            raise InputError(
                f"fit.solver: found {self.setup.fit.solver} with {ranks.count()} ranks; allowed: one rank, as it "
                "trains on all images"
            )
        found, graph = self._solvers.whole.fit(images, progress), self.setup.network.trace.graph
        if found is not None:
            self._note((graph.head or graph.output).path, found)

    def wants(self, node: Node) -> bool:
        if node.operation == "mix":
            return self._solvers.mixing is not None and self._solvers.mixing.wants(node)
        if node.fitted:
            return self._solver(node) is not None
        return node.operation == "batch_norm" and self.setup.fit.inputs == "merged"

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        if node.operation == "mix":
            return self._solvers.mixing.bytes(node, batch)
        if not node.fitted:
            return moments_bytes(self.setup.network, node, batch)
        return self._solver(node).bytes(Layer(self.setup, node), images, batch)

    def kept_bytes(self, node: Node, images: int) -> int:
        keeps = node.fitted and getattr(self._solver(node), "kept_bytes", None)
        return keeps(Layer(self.setup, node), images) if keeps else 0

    def visit(self, node: Node, sweep: Sweep) -> None:
        if node.operation == "mix":
            found = self._over_ranks(node, self._solvers.mixing, self._solvers.mixing.fit(node, sweep))
            self._note(node.path, found)
            return
        if not node.fitted:
            self._intercepts.set_statistics(node, sweep)
            return
        layer = Layer(self.setup, node)
        found = self._over_ranks(node, self._solver(node), self._solver(node).fit(LayerProblem(layer, sweep)))
        if found is not None:
            self._intercepts.install(layer, found)
            self._note(layer.name, found)

    def _over_ranks(
        self, node: Node, solver: Solver | NodeSolver, found: LayerSolution | None
    ) -> LayerSolution | None:
        """What rank 0 has found, for all."""
        if ranks.count() == 1:
            return found
        if not getattr(solver, "over_ranks", False):
            raise InputError(
                f"fit.solver: found {self.setup.fit.solver} with {ranks.count()} ranks; allowed: one rank, as it knows "
                "of its own images alone"
            )
        ranks.from_first(*self.setup.network.map_of(node).parameters())
        return ranks.said_by_first(found)

    def _note(self, name: str, found: LayerSolution) -> None:
        residual = found.residual / found.energy if found.energy > 0 else 0.0
        self.record.append(LayerFit(name, residual, found.ridge))

    def _solver(self, node: Node) -> Solver | None:
        return self._solvers.grouped if node.grouped else self._solvers.dense
