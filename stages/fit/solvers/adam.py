"""The published solver of PLeaS: Adam on each layer's least-squares objective, in mini-batches of images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.recipe.rooms import SOLVERS
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers

Pairs = Sequence[
    tuple[Tensor, Tensor, Tensor]
]  # of each batch: inputs, targets, outputs that count (1, d_out)


class Adam:
    """Holds the inputs and targets of all images; then the steps, each on a few, or the residual in float64.

    Settings: fit.steps, fit.learning_rate with cosine decay to zero, fit.batch_size images a step.
    """

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        module, fit = layer.module, layer.setup.fit
        itemsize, (z, y) = module.weights[0].element_size(), layer.entries
        held = images * (y + (0 if fit.inputs == "merged" else z))
        steps = fit.batch_size * (2 * z + 7 * y)  # of a step forward and back
        steps += 4 * sum(parameter.numel() for parameter in module.parameters())  # with Adam's two moments
        return itemsize * held + max(itemsize * steps, layer.rows_bytes(batch), 40 * batch * y)

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        """From where the layer is. The residual is that of all images."""
        module, fitted = problem.layer.module, problem.layer.fitted
        if not fitted.any():
            return None
        data = [
            (problem.inputs(index), problem.targets(index), problem.counted(task))
            for index, task, _ in problem.batches()
        ]
        before = [parameter.detach().clone() for parameter in module.parameters()]
        dim = -1 if problem.node.operation == "linear" else 1
        _descend(problem, data, fitted, dim)
        _restore(module, before, fitted)
        return LayerSolution(*_residual(module, data, fitted, dim))


@torch.enable_grad()
def _descend(problem: LayerProblem, data: Pairs, fitted: Tensor, dim: int) -> None:
    module, fit, generator = problem.layer.module, problem.setup.fit, problem.setup.generator
    where = torch.tensor([(b, i) for b, (z, _, _) in enumerate(data) for i in range(len(z))])
    optimizer = torch.optim.Adam(list(module.parameters()), lr=fit.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / fit.steps))
    )
    for _ in range(fit.steps):
        drawn = where[torch.randint(len(where), (fit.batch_size,), generator=generator)]
        drawn = drawn[drawn[:, 0].argsort(stable=True)]
        picked = [(b, drawn[drawn[:, 0] == b, 1]) for b in drawn[:, 0].unique().tolist()]
        z = torch.cat([data[b][0][i] for b, i in picked])
        y = torch.cat([data[b][1][i] for b, i in picked])
        mask = torch.cat([data[b][2].expand(len(i), -1) for b, i in picked]) & fitted
        error = (module(z) - y).movedim(dim, -1).square()
        mask = mask.view(len(mask), *[1] * (error.dim() - 2), -1).expand_as(error)
        optimizer.zero_grad()
        ((error * mask).sum() / mask.sum().clamp(min=1)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _restore(module: torch.nn.Module, before: list[Tensor], fitted: Tensor) -> None:
    """Rows that are copies have no gradient, and Adam leaves them: put them back to the last bit all the same."""
    values = dict(zip([id(p) for p in module.parameters()], before, strict=True))
    for block, weight in zip(module.blocks, module.weights, strict=True):
        kept = ~fitted[block.start : block.stop]
        weight[kept] = values[id(weight)][kept]
    if module.bias is not None:
        module.bias[~fitted] = values[id(module.bias)][~fitted]


@torch.no_grad()
def _residual(module: torch.nn.Module, data: Pairs, fitted: Tensor, dim: int) -> tuple[float, float]:
    """What is left of the targets, and their energy about the mean."""
    left = energy = 0.0
    count, mean = 0, 0.0
    for _, y, _ in data:
        rows = y.movedim(dim, -1).flatten(0, -2).double()
        mean, count = mean + rows.sum(0), count + len(rows)
    mean = mean / count
    offset = 0.0 if module.bias is not None else None
    if offset is None:  # without a bias the mean error is left to the batch norm behind
        error = sum((module(z) - y).movedim(dim, -1).flatten(0, -2).double().sum(0) for z, y, _ in data)
        offset = error / count
    for z, y, own in data:
        mask = (own & fitted).view(-1)
        rows = y.movedim(dim, -1).flatten(0, -2).double()
        error = (module(z) - y).movedim(dim, -1).flatten(0, -2).double() - offset
        left += float(error.square()[:, mask].sum())
        energy += float((rows - mean).square()[:, mask].sum())
    return left, energy


@SOLVERS.register(uses=("inputs", "targets", "steps", "learning_rate", "batch_size"))
def adam(setup: Setup) -> LayerSolvers:
    """The same for every kind of layer."""
    return LayerSolvers(Adam(), Adam())
