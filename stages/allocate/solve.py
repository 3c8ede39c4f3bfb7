"""Choose how many units each group keeps separate: the largest benefit within the budget.

Two steps. An integer program (HiGHS, through SciPy) over a grid of levels per group, exact in the products of the
cost, or minimum cuts where the network is large (``cut``); then single units, or steps from one allowed width to the
next, into what is left of the budget, the best benefit per cost first. Whole numbers throughout: the budget is never
exceeded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from stages.allocate.cut import around, dense_around
from stages.allocate.model import CostModel
from stages.allocate.simple import prefix, threshold, to_allowed, uniform
from stages.core.runtime.errors import InputError, shown

LARGEST = 8000  # product variables up to which the integer program is quick; above, minimum cuts
FINEST, ARCS = 64, 400_000  # of the minimum cuts: levels per group, arcs


@dataclass(frozen=True)
class Allocation:
    """separate: units of each group. benefit: reached. bound: what no split can exceed, if known (no split on the grid,
    from the integer program)."""

    separate: Mapping[str, int]
    cost: int
    benefit: float
    bound: float | None


def allocate(
    model: CostModel,
    benefits: Mapping[str, np.ndarray],
    budget: float,
    networks: int,
    levels: int = 8,
    nodes: int = 2000,
    by: str = "measured",
    dense: bool = False,
) -> Allocation:
    """benefits: of separating each unit of a group, (d,) non-negative, any order. budget: relative to one source.

    by: measured (the largest benefit), uniform, prefix or threshold. nodes: limit of the solver's search tree (a limit
    in time would not give the same answer twice). dense: that of the model; everything separate costs up to networks^2
    then.
    Raises InputError when the budget is not in [1, networks], or in [1, networks^2] of a dense network.
    """
    check_budget(budget, networks, dense)
    limit = int(Fraction(str(budget)) * model.base)  # exact: 1.46 is 146/100
    totals = {name: np.concatenate([[0.0], np.cumsum(np.sort(b)[::-1])]) for name, b in benefits.items()}
    if limit >= (model.whole if dense else networks * model.base):
        separate = dict(model.sizes)
        bound = sum(t[-1] for t in totals.values())
    elif limit <= model.base or not model.sizes:
        separate, bound = dict.fromkeys(model.sizes, 0), 0.0
    elif by != "measured":
        ways = {"uniform": uniform, "prefix": prefix, "threshold": partial(threshold, benefits=benefits)}
        spent = ways[by](model, limit)
        separate, bound = to_allowed(model, spent, limit), None
    else:
        separate, bound = _measured(model, totals, limit, levels, nodes, dense)
    reached = float(sum(totals[g][s] for g, s in separate.items()))
    cost = model.cost(separate)
    if cost > limit:
        raise AssertionError(f"allocation costs {cost}, the budget is {limit}")
    return Allocation(separate, cost, reached, None if bound is None else max(float(bound), reached))


def check_budget(budget: float, networks: int, dense: bool) -> None:
    """Gate. Raises InputError in one line."""
    most = networks**2 if dense else networks
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not number or not 1 <= budget <= most:
        raise InputError(f"budget: found {shown(budget)}; allowed: a number from 1 to {most}")


def _measured(
    model: CostModel, totals: Mapping[str, np.ndarray], limit: int, levels: int, nodes: int, dense: bool
) -> tuple[dict[str, int], float | None]:
    """The largest benefit within the limit. What copies may take is set aside; what they leave of it is not used."""
    if model.copied:
        left = limit - model.most_copied
        if left <= model.base:
            return dict.fromkeys(model.sizes, 0), None
        return _measured(replace(model, copied=()), totals, left, levels, nodes, dense)[0], None
    if _plans(model, levels) > LARGEST:
        return _large(model, totals, limit, levels, dense)
    separate, bound = _grid(model, totals, limit, levels, nodes)
    return _fill(model, totals, separate, limit), bound


def _plans(model: CostModel, levels: int) -> int:
    """Variables that the integer program has for the products."""
    sizes = {g: len(grid) for g, grid in _grids(model, levels).items()}
    return sum(sizes[i] * sizes[o] for i, o in model.product if i != o)


def _grid(
    model: CostModel, totals: Mapping[str, np.ndarray], limit: int, levels: int, nodes: int
) -> tuple[dict[str, int], float]:
    """The integer program. One binary per group and level; a product of two groups' levels is a transport plan
    between their binaries, which is exact as soon as they are whole."""
    names = list(model.sizes)
    grids = _grids(model, levels)
    first, count = {}, 0
    for g in names:
        first[g], count = count, count + len(grids[g])
    binaries = count
    pairs = {}
    for i, o in model.product:
        if i != o:
            pairs[i, o], count = count, count + len(grids[i]) * len(grids[o])
    gain, price = np.zeros(count), np.zeros(count)
    for g in names:
        q = model.product.get((g, g), 0)
        for level, s in enumerate(grids[g]):
            gain[first[g] + level] = totals[g][s]
            price[first[g] + level] = (model.linear[g] * s - q * s * s) / model.base
    rows, columns, values, right = [], [], [], []
    for g in names:  # one level per group
        rows += [len(right)] * len(grids[g])
        columns += range(first[g], first[g] + len(grids[g]))
        values += [1.0] * len(grids[g])
        right.append(1.0)
    for (i, o), start in pairs.items():
        plan = np.arange(start, start + len(grids[i]) * len(grids[o])).reshape(len(grids[i]), len(grids[o]))
        price[plan] = -model.product[i, o] * np.outer(grids[i], grids[o]) / model.base
        for group, lines in ((i, plan), (o, plan.T)):
            for level, line in enumerate(lines):
                rows += [len(right)] * (len(line) + 1)
                columns += [*line.tolist(), first[group] + level]
                values += [1.0] * len(line) + [-1.0]
                right.append(0.0)
    equal = coo_array((values, (rows, columns)), shape=(len(right), count)).tocsr()
    scale = max(gain.max(), 1e-300)
    result = milp(
        -gain / scale,
        integrality=(np.arange(count) < binaries).astype(int),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(equal, right, right),
            LinearConstraint(price[None], -np.inf, limit / model.base - 1),
        ],
        options={"node_limit": nodes, "mip_rel_gap": 1e-3},
    )
    if result.x is None:  # the node limit came before the first answer; the fill still finds one
        return dict.fromkeys(names, 0), float("inf")
    separate = {g: grids[g][int(np.argmax(result.x[first[g] : first[g] + len(grids[g])]))] for g in names}
    if model.cost(separate) > limit:  # the solver's tolerance let a hair through
        separate = _trim(model, totals, separate, limit)
    bound = -result.mip_dual_bound * scale if result.mip_dual_bound is not None else float("inf")
    return separate, bound


def _large(
    model: CostModel, totals: Mapping[str, np.ndarray], limit: int, levels: int, dense: bool
) -> tuple[dict[str, int], float]:
    """Minimum cuts: a solution below the budget filled up, or one above it trimmed, whichever gains most."""
    while levels < FINEST and _plans(model, 2 * levels) <= ARCS:  # a finer grid has a closer bound
        levels *= 2
    found, bound = (dense_around if dense else around)(model, totals, _grids(model, levels), limit)
    filled = [_fill(model, totals, _trim(model, totals, start, limit), limit) for start in found]
    return max(filled, key=lambda split: sum(totals[g][s] for g, s in split.items())), bound


def _grids(model: CostModel, levels: int) -> dict[str, list[int]]:
    even = {g: {round(i * d / levels) for i in range(levels + 1)} for g, d in model.sizes.items()}
    if not model.levels:
        return {g: sorted(grid) for g, grid in even.items()}
    return {g: sorted({_nearest(model.allowed(g), s) for s in grid}) for g, grid in even.items()}


def _nearest(levels: Sequence[int], s: int) -> int:
    return min(levels, key=lambda level: (abs(level - s), level))


def _fill(
    model: CostModel, totals: Mapping[str, np.ndarray], separate: dict[str, int], limit: int
) -> dict[str, int]:
    """Go on to the next allowed number of a group while it fits, the best benefit per cost first."""
    names, cost = list(model.sizes), model.cost(separate)
    count = np.array([separate[g] for g in names])
    steps, change = _steps(model, names, count)
    ahead = [_ahead(model.allowed(g)) for g in names]
    gains = [_gains(totals[g], own) for g, own in zip(names, ahead, strict=True)]
    more, gain = (np.array([own[s] for own, s in zip(table, count, strict=True)]) for table in (ahead, gains))
    while True:
        # n more units cost n times what the first does, less what each takes off the later ones
        price = more * steps - change.diagonal() * (more * (more - 1) // 2)
        ratio = np.where(cost + price <= limit, gain / np.maximum(price, 1), -np.inf)
        best = int(np.argmax(ratio))
        if ratio[best] == -np.inf:
            return dict(zip(names, count.tolist(), strict=True))
        cost += int(price[best])
        count[best] += more[best]
        steps -= more[best] * change[:, best]
        more[best], gain[best] = ahead[best][count[best]], gains[best][count[best]]


def _trim(
    model: CostModel, totals: Mapping[str, np.ndarray], separate: dict[str, int], limit: int
) -> dict[str, int]:
    """Go back to the allowed number before in a group until the budget holds, the least benefit per cost first."""
    names, cost = list(model.sizes), model.cost(separate)
    count = np.array([separate[g] for g in names])
    steps, change = _steps(model, names, count)
    behind = [_ahead([-s for s in reversed(model.allowed(g))])[::-1] for g in names]
    losses = [-_gains(totals[g], -own) for g, own in zip(names, behind, strict=True)]
    while cost > limit:
        fewer, lost = (
            np.array([own[s] for own, s in zip(table, count, strict=True)]) for table in (behind, losses)
        )
        freed = fewer * steps + change.diagonal() * (fewer * (fewer + 1) // 2)
        worst = int(np.argmin(lost / np.maximum(freed, 1)))
        cost -= int(freed[worst])
        count[worst] -= fewer[worst]
        steps += fewer[worst] * change[:, worst]
    return dict(zip(names, count.tolist(), strict=True))


def _ahead(levels: Sequence[int]) -> np.ndarray:
    """From each number between the first and the last level, how far it is to the next one; 0 at the end."""
    rising = np.array(levels)
    every = np.arange(rising[0], rising[-1] + 1)
    above = np.minimum(np.searchsorted(rising, every, side="right"), len(rising) - 1)
    return rising[above] - every


def _gains(totals: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """What the move from each number of units gains; -inf where there is none, which is never chosen."""
    every = np.arange(len(totals))
    return np.where(moves == 0, -np.inf, totals[every + moves] - totals)


def _steps(model: CostModel, names: list[str], count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What one more unit of each group costs, and how much less once another has one more: (G,) and (G, G)."""
    at = {g: n for n, g in enumerate(names)}
    change = np.zeros((len(names), len(names)), dtype=np.int64)
    for (i, o), q in model.product.items():
        change[at[i], at[o]] += q
        change[at[o], at[i]] += q
    return np.array([model.step(dict(zip(names, count.tolist(), strict=True)), g) for g in names]), change
