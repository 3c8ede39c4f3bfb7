"""The closed form: ridge regression, one block of a layer at a time.

Layers whose outputs read every input, and grouped convolutions: there every part of the channels is a small problem.
"""

from functools import partial

import torch
from torch import Tensor

from stages.core.recipe.rooms import SOLVERS
from stages.core.sweep.rows import weight_matrix
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.parts import PartEquations
from stages.fit.equations.rows import RowEquations
from stages.fit.equations.solve import Solution, solve
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.start import starts

Equations = MapEquations | NormalEquations | RowEquations


class Dense:
    """Holds sums of products of a layer's inputs, or the rows themselves where those are few; then solves them."""

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        sizes, blocks, count = (layer.d_in, layer.d_out), layer.block_sizes, layer.few_rows(images)
        if count is None and layer.maps is not None:
            return self._map_bytes(layer, batch)
        adding = layer.rows_bytes(batch)
        if count is not None:
            held = RowEquations.bytes(count, *sizes, layer.module.weights[0].element_size())
            return held + max(adding, *(RowEquations.solve_bytes(count, *block) for block in blocks))
        equations = len(layer.setup.sources) if layer.own_rows else 1
        adding += NormalEquations.add_bytes(*sizes)
        solving = [NormalEquations.solve_bytes(layer.d_in, *block) for block in blocks]
        return equations * NormalEquations.bytes(*sizes) + max(adding, *solving)

    def _map_bytes(self, layer: Layer, batch: int) -> int:
        solving = max(NormalEquations.solve_bytes(layer.d_in, *block) for block in layer.block_sizes)
        adding, equations = layer.maps_bytes(batch), len(layer.setup.sources) if layer.own_rows else 1
        return MapEquations.bytes(
            layer.maps, layer.module.inputs.width, layer.d_out, equations, adding, solving
        )

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        layer, module = problem.layer, problem.layer.module
        equations = self._equations(problem)
        for index, task, weight in problem.batches():
            into = equations[task if layer.own_rows else 0]
            if isinstance(into, MapEquations):
                into.add(problem.inputs(index), problem.targets(index), weight)
            else:
                problem.each_rows(index, partial(into.add, weight=weight))
        start = starts(layer)
        bias, mean, variance = torch.zeros(3, layer.d_out, dtype=torch.float64, device=layer.device)
        residual = energy = 0.0
        for i, block in enumerate(module.blocks):
            for rows in layer.row_sets(block):
                these = equations[int(module.outputs.owner[rows[0]]) if layer.own_rows else 0]
                found = self._solve(problem, these, i, rows, start[i])
                bias[rows] = found.bias
                if layer.intercept:
                    mean[rows], variance[rows] = found.moments
                residual += float(found.residual.sum())
                energy += float(found.energy.sum())
                del found  # before the next block's is made beside it
        if not layer.fitted.any():
            return None
        return LayerSolution(residual, energy, bias, torch.stack([mean, variance]))

    def _equations(self, problem: LayerProblem) -> list[Equations]:
        """One for all tasks, or one for each where a task has a head of its own."""
        layer = problem.layer
        sizes, what = (layer.d_in, layer.d_out, layer.intercept), (layer.device, layer.node.name)
        tasks = range(len(layer.setup.sources)) if layer.own_rows else [None]
        if layer.few_rows(problem.images()) is None and layer.maps is not None:
            maps = layer.node, layer.kernel, layer.map_size, layer.intercept, layer.node.name
            return [MapEquations(*maps) for _ in tasks]
        if layer.few_rows(problem.images()) is None:
            return [NormalEquations(*sizes, *what) for _ in tasks]
        counts = [layer.few_rows(problem.images(task)) for task in tasks]
        return [RowEquations(count, *sizes, problem.dtype, *what) for count in counts]

    def _solve(
        self,
        problem: LayerProblem,
        equations: Equations,
        i: int,
        rows: Tensor,
        start: Tensor,
    ) -> Solution:
        """Solve and install some rows of block i. start: (rows of the block, columns, ...)."""
        layer, block = problem.layer, problem.layer.module.blocks[i]
        weight, local = layer.module.weights[i], rows - block.start
        system = equations.block(rows.to(layer.device), layer.columns(block))
        found = solve(system, weight_matrix(start[local]).double(), problem.setup.ridge)
        weight[local] = found.weight.to(weight.dtype).view_as(weight[local])
        return found


class Grouped:
    """Holds the sums of products of all parts, and all their solutions."""

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        module = layer.module
        sums = PartEquations.bytes(module.groups, module.weight[0].numel(), layer.d_out // module.groups)
        return sums + layer.rows_bytes(batch)

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        layer, module = problem.layer, problem.layer.module
        fitted = layer.fitted
        if not fitted.any():
            return None
        equations = PartEquations(module.groups, layer.intercept, layer.node.name)
        for index, _, weight in problem.batches():
            problem.each_rows(index, partial(equations.add, weight=weight))
        start = starts(layer)[0].view(module.groups, -1, module.weight[0].numel())
        parts = [
            solve(system, own, problem.setup.ridge)
            for system, own in zip(equations.systems(), start, strict=True)
        ]
        weight = torch.cat([found.weight for found in parts]).view_as(module.weight)
        module.weight[fitted] = weight[fitted].to(module.weight.dtype)
        residual, energy, bias = (
            torch.cat([getattr(found, what) for found in parts]) for what in ("residual", "energy", "bias")
        )
        moments = torch.cat([found.moments for found in parts], 1) if layer.intercept else None
        return LayerSolution(float(residual[fitted].sum()), float(energy[fitted].sum()), bias, moments)


@SOLVERS.register(uses=("inputs", "targets", "norm", "ridge"))
def exact(setup: Setup) -> LayerSolvers:
    """One for each kind of layer."""
    return LayerSolvers(Dense(), Grouped())
