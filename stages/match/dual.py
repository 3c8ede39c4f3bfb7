"""MuDSC (Xu et al. 2024): matching in weight space and activation space at once.

The similarity of two units is rho times the correlation of their weights plus (1 - rho) times that of their
activations. The weights of a group depend on the order of its neighbours, so groups are visited in random order,
from the matching by activations on, and the best state that was seen is kept. Where units lie in parts, the similarity
is that of the units inside them, which are put in order pair by pair (stages.match.assign).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.core.units.groups import Inner, PermutationSpec, State
from stages.core.units.matching import inside_order
from stages.match.assign import assign_parts, assign_parts_jointly
from stages.match.weights import WeightProblem

PATIENCE = 5  # sweeps without gain


def match_dual(
    spec: PermutationSpec,
    states: Sequence[State],
    alike: Mapping[str, Tensor],
    rho: float,
    generator: torch.Generator,
    sweeps: int = 100,
) -> tuple[dict[str, Tensor], float]:
    """Match N networks; network 0 is the reference, the others are matched to the mean of all others.

    alike {group or inner: (N, N, d, d)}: correlation of activations, as from ``Statistics.between``. rho: 0 to 1.
    Returns ({group: int64 (N, d), inner: int64 (N, parts, size)}, mean similarity of the pairs).
    """
    problem, networks, names = WeightProblem(spec, states), len(states), list(spec.ordered)
    units = dict[str, Tensor]()
    for name, group in spec.ordered.items():
        own = {inner.name: alike[inner.name] for inner in spec.contents(name)}
        parts, inside = assign_parts_jointly(own, group.size, fixed=group.fixed)
        units |= spec.tables(name, parts, inside)
    best, kept, without = _objective(problem, alike, rho, units), _copy(units), 0
    for _ in range(sweeps if rho > 0 else 0):  # activations alone do not depend on the neighbours
        before = _copy(units)
        for index in torch.randperm(len(names), generator=generator).tolist():
            name = names[index]
            for m in range(1, networks):
                gains = {i.name: _gain(problem, alike, rho, units, i, m) for i in spec.contents(name)}
                order, inside = assign_parts(gains, spec.groups[name].size, spec.groups[name].fixed)
                for table, own in spec.tables(name, order, inside).items():
                    units[table][m] = own
        found = _objective(problem, alike, rho, units)
        without = 0 if found > best else without + 1
        if found > best:
            best, kept = found, _copy(units)
        if without == PATIENCE or all(torch.equal(units[g], before[g]) for g in units):
            break
    return kept, best


def _gain(
    problem: WeightProblem,
    alike: Mapping[str, Tensor],
    rho: float,
    units: Mapping[str, Tensor],
    inner: Inner,
    network: int,
) -> Tensor:
    """(d, d): what each unit of a network (columns) is worth in the place of each of the reference (rows)."""
    others = [n for n in range(len(problem.states)) if n != network]
    gain = sum((1 - rho) * alike[inner.name][n, network][inside_order(units, inner, n)] for n in others)
    if rho > 0:
        own = _standard(problem.unit_weights(units, inner, network, placed=False))
        for n in others:
            gain = gain + rho * _standard(problem.unit_weights(units, inner, n)) @ own.T
    return gain / len(others)


def _objective(
    problem: WeightProblem, alike: Mapping[str, Tensor], rho: float, units: Mapping[str, Tensor]
) -> float:
    """Mean over groups, networks and units of the similarity of what is matched."""
    values = []
    for name in problem.spec.ordered:
        for m in range(1, len(problem.states)):
            found = []
            for inner in problem.spec.contents(name):
                own = inside_order(units, inner, m)
                found.append(_gain(problem, alike, rho, units, inner, m)[torch.arange(len(own)), own])
            values.append(torch.cat(found).mean())
    return float(torch.stack(values).mean())


def _standard(rows: Tensor) -> Tensor:
    """Rows (d, entries) such that the product of two is their correlation; zero where a row is constant."""
    centred = rows - rows.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(
        length > 1e-12 * rows.norm(dim=1, keepdim=True), centred / length.clamp(min=1e-300), 0.0
    )


def _copy(units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own.clone() for name, own in units.items()}
