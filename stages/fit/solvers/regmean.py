"""RegMean (Jin et al. 2023): W = (sum_t G_t)^-1 sum_t G_t W_t^T, layer by layer.

G_t is the Gram matrix of network t's inputs on its own task's images, W_t its weights; off-diagonal entries are
scaled, which keeps the solution near the sources. What is not a linear map, biases included, is averaged. After an
alignment, both are those of the network as seen through it; with separate units, of all the inputs a block reads.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stages.core.align.alignment import view_states
from stages.core.recipe.rooms import SOLVERS
from stages.core.runtime import ranks
from stages.core.sweep.gram import add_gram, complete_gram, gram_bytes, restricted
from stages.core.sweep.maps import MapSums, map_entries
from stages.fit.equations.factor import Cholesky
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.solve import Energies, Solution, moved_by, solve
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.start import networks_weights


class RegMean:
    """Holds every task's Gram matrix, then those restricted to a block's inputs."""

    over_ranks = True

    def __init__(self, setup: Setup) -> None:
        self.states = view_states(setup.sources, setup.alignment, setup.network.shared)

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        networks = len(self.states)
        solving = [
            8 * columns * ((networks + 2) * columns + (2 * networks + 3) * rows)
            for columns, rows in layer.block_sizes
        ]
        if layer.maps is None:
            return 8 * networks * layer.d_in**2 + max(
                layer.rows_bytes(batch) + gram_bytes(layer.d_in), *solving
            )
        c = layer.module.inputs.width
        adding, solving = layer.maps_bytes(batch, targets=False), max(solving)
        return MapEquations.bytes(layer.maps, c, 0, networks, adding, solving)

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        layer, module = problem.layer, problem.layer.module
        merged = module.outputs.owner < 0  # separate units keep their network's weights
        if not merged.any():
            return None
        grams, residual, energy = self._grams(problem), 0.0, 0.0
        if ranks.rank():
            return None
        networks = networks_weights(layer, self.states)
        for i, (block, weight) in enumerate(zip(module.blocks, module.weights, strict=True)):
            rows = merged[block.start : block.stop].nonzero().flatten().to(weight.device)
            if len(rows):
                columns = layer.columns(block)
                if layer.maps is not None:
                    columns = map_entries(columns, layer.taps, layer.module.inputs.width)
                found = regression_mean(
                    [restricted(G, columns) for G in grams],
                    [own[i][rows].flatten(1).double() for own in networks],
                    problem.setup.ridge,
                    layer.node.name,
                )
                weight[rows] = found.weight.to(weight.dtype).view_as(weight[rows])
                residual += float(found.residual.sum())
                energy += float(found.energy.sum())
        return LayerSolution(residual, energy)

    def _grams(self, problem: LayerProblem) -> list[Tensor]:
        """G_t of every task, off-diagonal entries scaled: (d_in, d_in) each."""
        grams = self._by_rows(problem) if problem.layer.maps is None else self._by_maps(problem)
        ranks.to_first(*grams)
        for G in grams:
            diagonal = G.diagonal().clone()
            G.mul_(problem.setup.fit.off_diagonal).diagonal().copy_(diagonal)
        return grams

    def _by_rows(self, problem: LayerProblem) -> list[Tensor]:
        layer = problem.layer
        options = {"dtype": torch.float64, "device": layer.device}
        grams = [torch.zeros(layer.d_in, layer.d_in, **options) for _ in self.states]
        for index, task, weight in problem.batches():
            problem.each_input_rows(index, partial(add_gram, grams[task], weight=weight))
        for G in grams:
            complete_gram(G)
        return grams

    def _by_maps(self, problem: LayerProblem) -> list[Tensor]:
        layer = problem.layer
        sums = [MapSums(layer.node, layer.kernel, layer.map_size, False) for _ in self.states]
        for index, task, weight in problem.batches():
            sums[task].add(problem.inputs(index), weight=weight)
        return [own.finish().G for own in sums]


@dataclass(frozen=True)
class RegressionMean:
    """min sum_t tr (W - W_t) G_t (W - W_t)^T as a ``System``. grams: (d_in, d_in) each, weights: (d_out, d_in) each."""

    grams: list[Tensor]
    weights: list[Tensor]
    name: str = ""
    weight: float = 1.0
    eps: float = torch.finfo(torch.float32).eps
    means: None = None

    def matrix(self) -> Tensor:
        return sum(self.grams)

    def mean_diagonal(self, matrix: Tensor) -> float:
        return float(matrix.diagonal().mean())

    def left_by(self, start: Tensor, matrix: Tensor) -> Tensor:
        return sum(G @ (W - start).T for G, W in zip(self.grams, self.weights, strict=True))

    def moved(self, start: Tensor, solved: Tensor) -> Tensor:
        return start + solved.T

    def energies(self, W: Tensor) -> Energies:
        given, residual, energy = (
            sum(((V @ G) * V).sum(1) for G, V in zip(self.grams, own, strict=True))
            for own in ([W] * len(self.grams), [W - own for own in self.weights], self.weights)
        )
        return given, residual, energy

    def solved_by(self, factor: Cholesky, start: Tensor, penalty: float) -> tuple[Tensor, Energies]:
        return moved_by(self, factor, start, self.grams[0])


def regression_mean(grams: list[Tensor], weights: list[Tensor], ridge: float, name: str = "") -> Solution:
    """Float64. The ridge is towards the mean of the weights, so that what no image tells stays there."""
    return solve(RegressionMean(grams, weights, name), sum(weights) / len(weights), ridge)


@SOLVERS.register(uses=("ridge", "off_diagonal"), always={"inputs": "source", "targets": "own"})
def regmean(setup: Setup) -> LayerSolvers:
    """Grouped convolutions stay the average."""
    return LayerSolvers(RegMean(setup))
