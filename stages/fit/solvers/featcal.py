"""FeatCal (arXiv 2605.13030): forward-order least squares towards a mix of the sources' features and their weights.

On the merged network's own inputs z_M, with z_t those of the network t that owns an image and W_t, b_t its layer:

    min over W, b   sum_t 1 / |G_t|_F  sum_x |W z_M(x) + b - y_t(x)|^2   +   the ridge towards the average,
    y_t = a (W_t z_t + b_t) + (1 - a) (W_t z_M + b_t),      G_t = sum_x z_M z_M^T about its mean,

so that no task counts for more because its features are larger, and a layer is asked to undo only a part of the error
of those before it. a = 1 without the norms is `exact` with inputs: merged, targets: own.
"""

from functools import reduce

import torch
from torch import Tensor

from stages.core.align.alignment import view_states
from stages.core.recipe.rooms import SOLVERS
from stages.core.runtime import ranks
from stages.core.settings.sections import Fraction, Section
from stages.core.sweep.maps import RowSums
from stages.fit.average import average_vector
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.normal import NormalEquations, NormalSystem, join_
from stages.fit.equations.solve import Solution, solve
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.start import each_alone, networks_weights, starts
from stages.fit.sums import Sums, add, sums_of

RIDGE_TO_AVERAGE = 0.05  # the paper's


class Mix(Section):
    """mix: a, how much of a target is the source's own feature; the rest is its layer on the merged network's."""

    mix: Fraction = 0.3


class FeatCal:
    """Holds sums of products of every task, then those of a block, scaled and added."""

    over_ranks = True

    def __init__(self, setup: Setup, mix: float) -> None:
        self.mix, self.ridge = mix, RIDGE_TO_AVERAGE if setup.fit.ridge is None else setup.fit.ridge
        self.states = view_states(setup.sources, setup.alignment, setup.network.shared)

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        tasks, sizes = len(self.states), (layer.d_in, layer.d_out)
        solving = max(
            NormalEquations.solve_bytes(layer.d_in, *block) + 8 * 3 * block[0] * sum(block)
            for block in layer.block_sizes
        )
        if layer.maps is not None:
            c, adding = layer.module.inputs.width, layer.maps_bytes(batch)
            return MapEquations.bytes(layer.maps, c, layer.d_out, tasks, adding, solving)
        adding = layer.rows_bytes(batch) + NormalEquations.add_bytes(*sizes)
        return tasks * NormalEquations.bytes(*sizes) + max(adding, solving)

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        layer, module = problem.layer, problem.layer.module
        merged = module.outputs.owner < 0  # separate units keep their network's weights
        if not merged.any():
            return None
        equations = [sums_of(layer) for _ in self.states]
        for index, task, weight in problem.batches():
            add(problem, equations[task], problem.inputs(index), problem.targets(index), weight)
        for own in equations:
            own.finished()
        if ranks.rank():
            return None
        norms = [float(torch.linalg.matrix_norm(own.finished().G)) for own in equations]
        scales = [1 / norm if norm > 0 else 1.0 for norm in norms]
        weights, biases = networks_weights(layer, self.states), self._biases(layer)
        bias = torch.zeros(layer.d_out, dtype=torch.float64, device=layer.device)
        if module.bias is not None:
            bias += module.bias
        moments, residual, energy = bias.new_zeros(2, layer.d_out), 0.0, 0.0
        for i, (block, start) in enumerate(zip(module.blocks, starts(layer), strict=True)):
            local = merged[block.start : block.stop].nonzero().flatten().to(layer.device)
            if not len(local):
                continue
            rows, columns = local + block.start, layer.columns(block)
            sums = [
                self._mixed(own.block(rows, columns), W[i][local].flatten(1).double(), b[rows], scale)
                for own, W, b, scale in zip(equations, weights, biases, scales, strict=True)
            ]
            found = self._solve(sums, equations[0], start[local].flatten(1))
            own = module.weights[i]
            own[local] = found.weight.to(own.dtype).view_as(own[local])
            bias[rows] = found.bias
            if layer.intercept:
                moments[:, rows] = found.moments
            residual += float(found.residual.sum())
            energy += float(found.energy.sum())
        return LayerSolution(residual, energy, bias, moments, self.ridge)

    def _biases(self, layer: Layer) -> list[Tensor]:
        """b_t in the merged network's entries, zero where a network has none: (d_out,) each."""
        name = layer.node.parameters.get("bias")
        if name is None:
            return [torch.zeros(layer.d_out, dtype=torch.float64, device=layer.device) for _ in self.states]
        own = [state[name].double() for state in self.states]
        whole = [bias.new_ones(len(bias)) for bias in own]
        return [average_vector(lone, layer.module.outputs, whole) for lone in each_alone(own)]

    def _mixed(self, system: NormalSystem, W: Tensor, b: Tensor, scale: float) -> RowSums:
        """The sums of one task with its mixed targets. scale: one over the Frobenius norm of its Gram matrix."""
        G, a = system.matrix(), self.mix
        C = system.C.mul(a).addmm_(G, W.T, alpha=1 - a)
        given = ((W @ G) * W).sum(1)
        yy = a**2 * system.yy + 2 * a * (1 - a) * (W * system.C.T).sum(1) + (1 - a) ** 2 * given
        means = None
        if system.means is not None:
            mean_z, mean_y = system.means
            means = mean_z, a * mean_y + (1 - a) * (W @ mean_z + b)
        return RowSums(system.weight * scale, G.mul_(scale), C.mul_(scale), yy * scale, means)

    def _solve(self, sums: list[RowSums], like: Sums, start: Tensor) -> Solution:
        whole = reduce(join_, sums)
        every = torch.arange(len(whole.G), device=whole.G.device)
        system = NormalSystem(
            whole.G, every, whole.C, whole.yy, whole.means, whole.weight, like.eps, like.name
        )
        return solve(system, start, self.ridge)


@SOLVERS.register(uses=("ridge",), own=Mix, always={"inputs": "merged", "targets": "own"})
def featcal(setup: Setup) -> LayerSolvers:
    """Grouped convolutions stay the average."""
    return LayerSolvers(FeatCal(setup, setup.fit.own(Mix).mix))
