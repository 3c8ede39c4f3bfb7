"""Splits on the hull of benefit and cost, for problems too large for the integer program.

A price p per cost turns the problem into the largest benefit(s) - p cost(s). The products of the cost are taken off
it, so this is supermodular and one minimum cut solves it exactly (Picard 1976, maximal closure: a node per group and
level, an arc per product). The price at which the budget lies between two solutions minimises the Lagrangian bound
(Everett 1963); it is found by drawing the line through the two, as often as a solution lies above it.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from stages.allocate.model import CostModel

WHOLE = 1_000_000_000  # the sum of all capacities: they are 32-bit whole numbers


class Cuts:
    """The closure problem of a model on a grid {group: rising levels from 0 to d}."""

    def __init__(self, model: CostModel, totals: Mapping[str, np.ndarray], grids: Mapping[str, list[int]]):
        self.model, self.totals, self.grids = model, totals, grids
        self.first, count = {}, 0
        gain, price, chain = [], [], []
        for g, grid in grids.items():
            self.first[g] = count
            levels, q = np.array(grid, dtype=np.float64), model.product.get((g, g), 0)
            gain += np.diff(totals[g][grid]).tolist()
            price += (np.diff(model.linear[g] * levels - q * levels**2) / model.base).tolist()
            chain += [(n, n - 1) for n in range(count + 1, count + len(grid) - 1)]
            count += len(grid) - 1
        self.gain, self.price, self.chain = np.array(gain), np.array(price), np.array(chain).reshape(-1, 2)
        rows, columns, weights = [], [], []
        for (i, o), q in model.product.items():
            if i != o and q:
                a, b = np.diff(grids[i]), np.diff(grids[o])
                rows.append(np.repeat(self.first[i] + np.arange(len(a)), len(b)))
                columns.append(np.tile(self.first[o] + np.arange(len(b)), len(a)))
                weights.append(q / model.base * np.outer(a, b).ravel())
        self.rows, self.columns = (np.concatenate([*x, []]).astype(int) for x in (rows, columns))
        self.weights = np.concatenate([*weights, []])

    def best(self, price: float) -> tuple[dict[str, int], float]:
        """A split of largest benefit - price (cost / base - 1), and a bound on that value (it rounds upwards)."""
        count = len(self.gain)
        pair = price * self.weights
        alone = self.gain - price * self.price
        unit = (np.abs(alone).sum() + 2 * pair.sum()) / WHOLE or 1.0
        pair = np.ceil(pair / unit).astype(np.int64)
        alone = np.ceil(alone / unit).astype(np.int64) + np.bincount(
            self.rows, weights=pair, minlength=count
        ).astype(np.int64)
        source, sink, every = count, count + 1, np.arange(count)
        rows = np.concatenate([np.full(count, source), every, self.rows, self.chain[:, 0]])
        columns = np.concatenate([every, np.full(count, sink), self.columns, self.chain[:, 1]])
        capacity = np.concatenate(
            [np.maximum(alone, 0), np.maximum(-alone, 0), pair, np.full(len(self.chain), 2 * WHOLE)]
        )
        kept = capacity > 0
        arcs = csr_array(
            coo_array(
                (capacity[kept].astype(np.int32), (rows[kept], columns[kept])), shape=(count + 2, count + 2)
            )
        )
        arcs.indices, arcs.indptr = arcs.indices.astype(np.int32), arcs.indptr.astype(np.int32)
        found = maximum_flow(arcs, source, sink)
        left = csr_array(arcs - found.flow)
        left.eliminate_zeros()
        reached = np.zeros(count + 2, dtype=bool)
        reached[breadth_first_order(left, source, return_predecessors=False)] = True
        separate = {
            g: grid[int(reached[self.first[g] : self.first[g] + len(grid) - 1].sum())]
            for g, grid in self.grids.items()
        }
        return separate, float(np.maximum(alone, 0).sum() - found.flow_value) * unit

    def benefit(self, separate: Mapping[str, int]) -> float:
        """Of a split."""
        return float(sum(self.totals[g][s] for g, s in separate.items()))

    def value(self, separate: Mapping[str, int], price: float) -> float:
        """What ``best`` makes large, and the benefit of no level at all."""
        return self.benefit(separate) - price * (self.model.cost(separate) / self.model.base - 1)


Found = tuple[
    list[dict[str, int]], float
]  # splits, and a bound on the benefit of any split within the budget


def around(
    model: CostModel, totals: Mapping[str, np.ndarray], grids: Mapping[str, list[int]], limit: int
) -> Found:
    """The solutions on both sides of the budget, and the bound."""
    cuts = Cuts(model, totals, grids)
    low, high, bound = _bracket(cuts, dict.fromkeys(model.sizes, 0), dict(model.sizes), limit)
    return [low, high], bound


def dense_around(
    model: CostModel, totals: Mapping[str, np.ndarray], grids: Mapping[str, list[int]], limit: int
) -> Found:
    """The same of a dense network, whose products add to the cost: what comes close on both sides, and a true bound.

    No cut solves that as it is. With a second split s' beside s, the mean of both costs and benefits, and each product
    as (s_i s'_o + s'_i s_o) / 2, it is no worse than the best single split (take it twice), and a cut in s and in the
    shared units d - s' solves it (roof duality: Hammer, Hansen and Simeone 1984). Where products join the groups in two
    halves, as in a chain, nothing is lost by it.
    """
    twin = {g: f"{g}, shared" for g in model.sizes}
    sizes = {**model.sizes, **{twin[g]: d for g, d in model.sizes.items()}}
    linear = {**model.linear, **{twin[g]: -price for g, price in model.linear.items()}}
    product: dict[tuple[str, str], int] = {}
    for (i, o), q in model.product.items():
        for one, other in ((i, o), (o, i)):
            linear[one] -= q * model.sizes[other]
            product[one, twin[other]] = product.get((one, twin[other]), 0) - q
    base = 2 * model.base + sum(price * model.sizes[g] for g, price in model.linear.items())
    both = {**totals, **{twin[g]: own[::-1] for g, own in totals.items()}}
    levels = {**grids, **{twin[g]: [model.sizes[g] - s for s in reversed(own)] for g, own in grids.items()}}
    cuts = Cuts(CostModel(sizes, base, linear, product), both, levels)
    shared = {**dict.fromkeys(model.sizes, 0), **{twin[g]: d for g, d in model.sizes.items()}}
    *ends, bound = _bracket(cuts, shared, {g: sizes[g] - s for g, s in shared.items()}, 2 * limit)
    pairs = [{g: sorted((own[g], model.sizes[g] - own[twin[g]])) for g in model.sizes} for own in ends]
    return [{g: pair[n] for g, pair in own.items()} for own in pairs for n in (0, 1)], bound / 2


def _bracket(
    cuts: Cuts, low: dict[str, int], high: dict[str, int], limit: int, rounds: int = 40
) -> tuple[dict[str, int], dict[str, int], float]:
    """The solutions on both sides of the budget, from two that are far below and above it, and the bound.

    The bound holds between the levels too: with benefits that are lines from level to level and nowhere below the
    true ones, benefit - price cost is convex along every group from level to level, so largest on the grid.
    """
    model, grids, price = cuts.model, cuts.grids, 0.0
    for _ in range(rounds):
        rise = (model.cost(high) - model.cost(low)) / model.base
        price = max(cuts.benefit(high) - cuts.benefit(low), 0.0) / rise
        found = cuts.best(price)[0]
        if found in (low, high) or cuts.value(found, price) <= cuts.value(low, price) * (1 + 1e-9):
            break
        if model.cost(found) <= limit:
            low = found
        else:
            high = found
    lifted = Cuts(model, {g: lift(cuts.totals[g], grid) for g, grid in grids.items()}, grids)
    start = sum(lifted.totals[g][0] for g in grids)
    return low, high, start + lifted.best(price)[1] + price * (limit / model.base - 1)


def lift(totals: np.ndarray, grid: list[int]) -> np.ndarray:
    """Concave totals (d + 1,) raised on the grid, so that the lines between its levels are nowhere below them."""
    raised = totals.copy()
    for a, b in pairwise(grid):
        gap = float((totals[a : b + 1] - np.linspace(totals[a], totals[b], b - a + 1)).max())
        for end in (a, b):
            raised[end] = max(raised[end], totals[end] + gap)
    return raised
