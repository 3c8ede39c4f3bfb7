"""The closed form for grouped convolutions: every part of the channels is a small problem of its own."""

from functools import partial

import torch

from stages.fit.equations.parts import PartEquations
from stages.fit.equations.solve import solve
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.start import starts


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
