"""The closed form: ridge regression, one block of a layer at a time.

Layers whose outputs read every input, and grouped convolutions: there every part of the channels is a small problem.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stages.core.recipe.rooms import SOLVERS
from stages.core.runtime import ranks
from stages.core.sweep.rows import weight_matrix
from stages.fit.equations.apart import RowsApart, SumsApart
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.normal import NormalEquations, join_
from stages.fit.equations.parts import PartEquations
from stages.fit.equations.ridge import MIDDLE, Losses, decide
from stages.fit.equations.rows import RowEquations
from stages.fit.equations.solve import System, solve
from stages.fit.equations.trial import SumTrial, Trial, some, trial_bytes
from stages.fit.layer import Layer
from stages.fit.mixing import Mixing
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.start import starts
from stages.fit.sums import add, sums_of

Equations = SumsApart | RowsApart


class Dense:
    """Holds sums of products of a layer's inputs, or the rows themselves where those are few; then solves them."""

    over_ranks = True

    def __init__(self) -> None:
        self._chosen: dict[int, float] = {}  # the last layer's with as many inputs

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        sizes, blocks, count = (layer.d_in, layer.d_out), layer.block_sizes, layer.few_rows(images)
        if count is None and layer.maps is not None:
            return self._map_bytes(layer, batch)
        adding = layer.rows_bytes(batch)
        if count is not None:
            held = RowEquations.bytes(count, *sizes, layer.module.weights[0].element_size())
            solving = [RowEquations.solve_bytes(count, *block) for block in blocks]
            if layer.setup.ridge == "auto":  # joined while products are kept
                solving += [held + RowsApart.bytes(count, columns) for columns, _ in blocks]
            return held + max(adding, *solving, *self._trials(layer, count))
        equations = self._count(layer)
        adding += NormalEquations.add_bytes(*sizes)
        solving = [NormalEquations.solve_bytes(layer.d_in, *block) for block in blocks]
        return equations * NormalEquations.bytes(*sizes) + max(adding, *solving, *self._trials(layer))

    def _map_bytes(self, layer: Layer, batch: int) -> int:
        solving = [NormalEquations.solve_bytes(layer.d_in, *block) for block in layer.block_sizes]
        solving = max(*solving, *self._trials(layer))
        adding, equations = layer.maps_bytes(batch), self._count(layer)
        return MapEquations.bytes(
            layer.maps, layer.module.inputs.width, layer.d_out, equations, adding, solving
        )

    def _count(self, layer: Layer) -> int:
        """Of the equations that are held at a time: of every task with a head of its own, and of images held out."""
        tasks = len(layer.setup.sources) if layer.own_rows else 1
        return 2 * tasks if layer.setup.ridge == "auto" else tasks

    def _trials(self, layer: Layer, count: int | None = None) -> list[int]:
        """What trying ridges takes for each block beside the equations. count: of rows, where these are held."""
        if layer.setup.ridge != "auto":
            return [0]
        rows_of = 2 * 8 * (count or 0)  # for each column
        return [
            rows_of * columns + trial_bytes(count or columns, columns, rows)
            for columns, rows in layer.block_sizes
        ]

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        layer = problem.layer
        parts = problem.parts()
        equations = self._equations(problem, parts)
        for index, task, weight in problem.batches():
            own = equations[task if layer.own_rows else 0].parts[problem.part(index)]
            add(problem, own, problem.inputs(index), problem.targets(index), weight)
        for own in equations:
            own.finished()
        if ranks.rank():
            return None
        start = starts(layer)
        losses = _losses(layer, equations, start) if parts > 1 else None
        ridge = decide(problem.setup.ridge, losses, self._chosen.get(layer.d_in, MIDDLE))
        if losses is not None:
            self._chosen[layer.d_in] = ridge
        del losses  # and the matrices it has kept
        for own in equations:
            own.join()
        return self._install(layer, equations, start, ridge)

    def _install(
        self, layer: Layer, equations: list[Equations], start: list[Tensor], ridge: float
    ) -> LayerSolution | None:
        bias, mean, variance = torch.zeros(3, layer.d_out, dtype=torch.float64, device=layer.device)
        residual = energy = 0.0
        for own in _problems(layer, start):
            rows, weight = own.rows, layer.module.weights[own.block]
            found = solve(own.system(equations), own.start, ridge)
            weight[own.local] = found.weight.to(weight.dtype).view(-1, *weight.shape[1:])
            bias[rows] = found.bias
            if layer.intercept:
                mean[rows], variance[rows] = found.moments
            residual += float(found.residual.sum())
            energy += float(found.energy.sum())
            del found  # before the next block's is made beside it
        if not layer.fitted.any():
            return None
        return LayerSolution(residual, energy, bias, torch.stack([mean, variance]), ridge)

    def _equations(self, problem: LayerProblem, parts: int) -> list[Equations]:
        """One for all tasks, or one for each where a task has a head of its own."""
        layer = problem.layer
        tasks = range(len(layer.setup.sources)) if layer.own_rows else [None]
        if layer.few_rows(problem.images()) is None:
            return [SumsApart([sums_of(layer) for _ in range(parts)]) for _ in tasks]
        sizes, what = (layer.d_in, layer.d_out, layer.intercept), (layer.device, layer.node.name)
        counts = [[problem.count(part, task) * layer.places for part in range(parts)] for task in tasks]
        return [RowsApart([RowEquations(n, *sizes, problem.dtype, *what) for n in own]) for own in counts]


@dataclass(frozen=True)
class _Problem:
    """Some rows of a block that are solved together. local: within the block. start: (rows, columns) float64."""

    block: int
    rows: Tensor
    local: Tensor
    columns: Tensor
    task: int
    start: Tensor

    def system(self, equations: list[Equations]) -> System:
        return equations[self.task].block(self.rows, self.columns)

    def trial(self, equations: list[Equations]) -> Trial:
        """Of some of its rows."""
        return equations[self.task].trial(some(self.rows), self.columns, some(self.start))


def _losses(layer: Layer, equations: list[Equations], start: list[Tensor]) -> Losses:
    """Energy left of the images held out by what is learnt from the others, for each of some ridges."""
    kept: list[Trial] = []

    def losses(ridges: Sequence[float]) -> list[float]:
        total = [0.0] * len(ridges)
        problems = list(_problems(layer, start))
        for own in problems:
            if len(problems) > 1:  # each is made again: all of them would take more memory
                kept.clear()
            if not kept:
                kept.append(own.trial(equations))
            total = [a + b for a, b in zip(total, kept[0].losses(ridges), strict=True)]
        return total

    return losses


def _problems(layer: Layer, start: list[Tensor]) -> Iterator[_Problem]:
    for i, block in enumerate(layer.module.blocks):
        for rows in layer.row_sets(block):
            local = rows - block.start
            yield _Problem(
                i,
                rows.to(layer.device),
                local,
                layer.columns(block),
                int(layer.module.outputs.owner[rows[0]]) if layer.own_rows else 0,
                weight_matrix(start[i][local]).double(),
            )


PARTS = 32  # of a grouped map, that the ridge is chosen by


class Grouped:
    """Holds the sums of products of all parts, and all their solutions."""

    over_ranks = True

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
            PartEquations(module.groups, layer.intercept, layer.node.name) for _ in range(problem.parts())
        ]
        for index, _, weight in problem.batches():
            own = partial(equations[problem.part(index)].add, weight=weight)
            problem.by_rows(problem.inputs(index), problem.targets(index), own)
        systems = [own.systems() for own in equations]
        if ranks.rank():
            return None
        start = starts(layer)[0].view(module.groups, -1, module.weight[0].numel()).double()
        whole, *others = systems
        ridge = decide(problem.setup.ridge, _losses_of_parts(*systems, start) if others else None)
        for held in others:
            whole = [replace(own, **vars(join_(own, other))) for own, other in zip(whole, held, strict=True)]
        parts = [solve(system, own, ridge) for system, own in zip(whole, start, strict=True)]
        weight = torch.cat([found.weight for found in parts]).view_as(module.weight)
        module.weight[fitted] = weight[fitted].to(module.weight.dtype)
        residual, energy, bias = (
            torch.cat([getattr(found, what) for found in parts]) for what in ("residual", "energy", "bias")
        )
        moments = torch.cat([found.moments for found in parts], 1) if layer.intercept else None
        return LayerSolution(float(residual[fitted].sum()), float(energy[fitted].sum()), bias, moments, ridge)


def _losses_of_parts(learnt: list[System], held: list[System], start: Tensor) -> Losses:
    """Energy left of the images held out, over some parts, for each of some ridges."""
    parts = range(0, len(start), -(-len(start) // PARTS))
    trials = [SumTrial(learnt[i], held[i], start[i]) for i in parts]
    return lambda ridges: [sum(own) for own in zip(*(trial.losses(ridges) for trial in trials), strict=True)]


@SOLVERS.register(uses=("inputs", "targets", "norm", "ridge"), chooses_ridge=True)
def exact(setup: Setup) -> LayerSolvers:
    """One for each kind of layer."""
    return LayerSolvers(Dense(), Grouped(), Mixing(setup))
