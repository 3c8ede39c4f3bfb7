"""The closed form for grouped convolutions: every part of the channels is a small problem of its own."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stages.core.recipe.sections import RIDGE_OF_FEW
from stages.fit.equations.normal import join_
from stages.fit.equations.parts import PartEquations
from stages.fit.equations.ridge import choose
from stages.fit.equations.solve import System, left_over, solve
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.start import starts

MOST = 32  # parts that the ridge is chosen by


class Grouped:
    """Holds the sums of products of all parts, and all their solutions."""

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        module = layer.module
        sums = PartEquations.bytes(module.groups, module.weight[0].numel(), layer.d_out // module.groups)
        sums *= 2 if layer.setup.ridge == "auto" else 1  # those of the images held out
        return sums + layer.rows_bytes(batch)

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        layer, module = problem.layer, problem.layer.module
        fitted = layer.fitted
        if not fitted.any():
            return None
        equations = [
            PartEquations(module.groups, layer.intercept, layer.node.name)
            for _ in range(1 if problem.held is None else 2)
        ]
        for index, _, weight in problem.batches():
            for part, z, y in problem.parts(index):
                problem.by_rows(z, y, partial(equations[part].add, weight=weight))
        systems = [own.systems() for own in equations]
        start = starts(layer)[0].view(module.groups, -1, module.weight[0].numel())
        ridge = problem.setup.ridge
        if len(systems) == 2:
            ridge = choose(partial(_loss, *systems, start))
            joined = [replace(own, **vars(join_(own, held))) for own, held in zip(*systems, strict=True)]
            systems = [joined]
        elif ridge == "auto":
            ridge = RIDGE_OF_FEW
        parts = [solve(system, own, ridge) for system, own in zip(systems[0], start, strict=True)]
        weight = torch.cat([found.weight for found in parts]).view_as(module.weight)
        module.weight[fitted] = weight[fitted].to(module.weight.dtype)
        residual, energy, bias = (
            torch.cat([getattr(found, what) for found in parts]) for what in ("residual", "energy", "bias")
        )
        moments = torch.cat([found.moments for found in parts], 1) if layer.intercept else None
        return LayerSolution(float(residual[fitted].sum()), float(energy[fitted].sum()), bias, moments, ridge)


def _loss(learnt: list[System], held: list[System], start: Tensor, ridge: float) -> float:
    """Energy left of the images held out, over some parts."""
    some = range(0, len(start), -(-len(start) // MOST))
    return sum(left_over(held[i], solve(learnt[i], start[i], ridge)) for i in some)
