"""The published solver of PLeaS: Adam on each layer's least-squares objective, in mini-batches of images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.recipe.rooms import SOLVERS
from stages.core.runtime import ranks
from stages.core.sweep.values import Kept
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets of every batch, where the sweep's values are; outputs that count, (1, d_out) each."""

    z: Kept
    y: Kept
    counted: Sequence[Tensor]
    where: Tensor  # of every image of all ranks: its batch and place there, -1 where another rank has it

    def of(self, drawn: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some images, by rows of ``where``, batch by batch."""
        for b in drawn[:, 0].unique().tolist():
            i = drawn[drawn[:, 0] == b, 1]
            yield self.z.rows(b, i), self.y.rows(b, i), self.counted[b].expand(len(i), -1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index, counted in enumerate(self.counted):
            yield self.z[index], self.y[index], counted


class Adam:
    """Holds the inputs and targets of all images; then the steps, each on a few, or the residual in float64.

    Settings: fit.steps, fit.learning_rate with cosine decay to zero, fit.batch_size images a step.
    """

    over_ranks = True

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        module, fit = layer.module, layer.setup.fit
        itemsize, (z, y) = module.weights[0].element_size(), layer.entries
        steps = fit.batch_size * (2 * z + 7 * y)  # of a step forward and back
        steps += 4 * sum(parameter.numel() for parameter in module.parameters())  # with Adam's two moments
        return max(itemsize * steps, layer.rows_bytes(batch), 40 * batch * y)

    def kept_bytes(self, layer: Layer, images: int) -> int:
        z, y = layer.entries
        held = y + (0 if layer.setup.fit.inputs == "merged" else z)
        return layer.module.weights[0].element_size() * images * held

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        """From where the layer is. The residual is that of all images."""
        module, fitted = problem.layer.module, problem.layer.fitted
        if not fitted.any():
            return None
        data = _pairs(problem)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        dim = -1 if problem.node.operation == "linear" else 1
        _descend(problem, data, fitted, dim)
        _restore(module, before, fitted)
        found = LayerSolution(*_residual(module, data, fitted, dim))
        data.z.close()
        data.y.close()
        return found


def _pairs(problem: LayerProblem) -> Pairs:
    problem.setup.check_one_size("solver adam")
    z, y, counted, where = problem.keep(), problem.keep(), [], []
    for index, task, _ in problem.batches():
        z.append(problem.inputs(index))
        y.append(problem.targets(index))
        counted.append(problem.counted(task))
        where += [(index, i) for i in range(problem.size(index))]
    return Pairs(z, y, counted, _among_all(problem, torch.tensor(where)))


def _among_all(problem: LayerProblem, own: Tensor) -> Tensor:
    """The images of one rank among those of all, task after task: (images, 2)."""
    if ranks.count() == 1:
        return own
    found, done = torch.full((problem.images(), 2), -1), 0
    for start, images in problem.tasks():
        mine = ranks.share(images)
        found[start + mine] = own[done : done + len(mine)]
        done += len(mine)
    return found


@torch.enable_grad()
def _descend(problem: LayerProblem, data: Pairs, fitted: Tensor, dim: int) -> None:
    module, fit, generator = problem.layer.module, problem.setup.fit, problem.setup.generator
    where, parameters = data.where, list(module.parameters())
    if ranks.count() > 1:
        generator.set_state(ranks.said_by_first(generator.get_state()))
    optimizer = torch.optim.Adam(parameters, lr=fit.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / fit.steps))
    )
    for _ in range(fit.steps):
        drawn = where[torch.randint(len(where), (fit.batch_size,), generator=generator)]
        drawn = drawn[drawn[:, 0] >= 0]
        total, counted = _step(module, data, drawn[drawn[:, 0].argsort(stable=True)], fitted, dim)
        ranks.add_up(counted)
        optimizer.zero_grad()
        (total / counted.clamp(min=1)).backward()
        ranks.add_up(*(own.grad for own in parameters))
        optimizer.step()
        schedule.step()


def _step(
    module: torch.nn.Module, data: Pairs, drawn: Tensor, fitted: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """The squared error over this rank's images of a step, and of how many entries."""
    if not len(drawn):
        nothing = torch.zeros((), dtype=torch.int64, device=fitted.device)
        return sum(own.sum() for own in module.parameters()) * 0, nothing
    z, y, counted = (torch.cat(own) for own in zip(*data.of(drawn), strict=True))
    error = (module(z) - y).movedim(dim, -1).square()
    mask = (counted & fitted).view(len(counted), *[1] * (error.dim() - 2), -1).expand_as(error)
    return (error * mask).sum(), mask.sum()


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
    count = mean.new_tensor(count)
    ranks.add_up(mean, count)
    mean = mean / count
    offset = 0.0 if module.bias is not None else None
    if offset is None:  # without a bias the mean error is left to the batch norm behind
        error = sum((module(z) - y).movedim(dim, -1).flatten(0, -2).double().sum(0) for z, y, _ in data)
        ranks.add_up(error)
        offset = error / count
    for z, y, own in data:
        mask = (own & fitted).view(-1)
        rows = y.movedim(dim, -1).flatten(0, -2).double()
        error = (module(z) - y).movedim(dim, -1).flatten(0, -2).double() - offset
        left += float(error.square()[:, mask].sum())
        energy += float((rows - mean).square()[:, mask].sum())
    found = torch.tensor([left, energy], dtype=torch.float64, device=mean.device)
    ranks.add_up(found)
    return float(found[0]), float(found[1])


@SOLVERS.register(uses=("inputs", "targets", "steps", "learning_rate", "batch_size"))
def adam(setup: Setup) -> LayerSolvers:
    """The same for every kind of layer."""
    return LayerSolvers(Adam(), Adam())
