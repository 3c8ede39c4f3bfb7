"""The published solver of PLeaS: Adam on each layer's least-squares objective, in mini-batches of images."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.sweep.sweep import Sweep

if TYPE_CHECKING:
    from stages.fit.layerwise import Fitter


def fit_adam(fitter: "Fitter", node: Node, sweep: Sweep, fitted: Tensor) -> float:
    """Fit one layer from where it is; rows that are copies (``fitted`` False) stay.

    Returns the relative residual energy on all images. Settings: fit.steps, fit.learning_rate with cosine decay to
    zero, fit.batch_size images a step.
    """
    module = fitter.network.map_of(node)
    fit = fitter.fit
    data = [
        (
            fitter.inputs(node, sweep, index),
            fitter.targets(node, sweep, index),
            _rows(fitter, node, batch.task),
        )
        for index, batch in enumerate(sweep.batches)
    ]
    where = torch.tensor([(b, i) for b, (z, _, _) in enumerate(data) for i in range(len(z))])
    fitted = fitted.to(data[0][0].device)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=fit.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / fit.steps))
    )
    dim = -1 if node.operation == "linear" else 1
    with torch.enable_grad():
        for _ in range(fit.steps):
            drawn = where[torch.randint(len(where), (fit.batch_size,), generator=fitter.generator)]
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
    _restore(module, before, fitted)
    return _residual(module, data, fitted, dim)


def _rows(fitter: "Fitter", node: Node, task: int) -> Tensor:
    """Which outputs an image of ``task`` counts for: bool (1, width)."""
    owner = fitter.network.map_of(node).outputs.owner
    counted = owner == task if fitter.own_rows(node) else torch.ones_like(owner, dtype=torch.bool)
    return counted[None].to(fitter.sources[0].state[node.parameters["weight"]].device)


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
def _residual(module: torch.nn.Module, data: list, fitted: Tensor, dim: int) -> float:
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
    return left / energy if energy else 0.0
