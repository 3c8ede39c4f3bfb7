"""Partial Fusion (arXiv 2605.22350): transport with a sink, in which units that cost too much stay separate.

Units of the first network and of another are paired at the cost of OT Fusion, or go to the sink at one price for a
pair. Where the price is low much goes there; as it rises, pairs leave the sink, each at the price that it costs more to
have one pair more. That never falls, and a unit that has left the sink stays out of it, so that all plans are one order
of units and prices. What is shared at the price that a budget affords is then paired by exact transport.

Costs are relative to the mean of their group, for one price to mean the same in every layer. With more than two
networks a unit is shared when it has a partner in all of them.
"""

import numpy as np
import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.align.problem import Problem
from stages.core.align.ways.transport import align_transport, unit_cost
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS


def sink_tuples(problem: Problem, settings: MatchSettings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Units that leave the sink together, {group: int64 (N, d)}, and the price at which they do, {group: (d,)}."""
    whole = align_transport(problem, settings) if settings.features == "weights" else None
    units, prices, front = {}, {}, Alignment(problem.networks)
    for name, moments in problem.after.items():
        k = moments.sizes[0]
        rows, price = [torch.arange(k)], torch.zeros(k, dtype=torch.float64)
        for m in range(1, problem.networks):
            cost = unit_cost(problem, front, name, m, settings)
            mean = float(cost.mean())
            columns, own = leave_sink((cost / (mean if mean > 0 else 1.0)).cpu().numpy())
            rows.append(torch.from_numpy(columns))
            price = torch.maximum(price, torch.from_numpy(own))
        units[name], prices[name] = torch.stack(rows), price
        if whole is not None:
            front = Alignment(problem.networks, {**front.groups, name: whole.groups[name]})
    return units, prices


@ALIGNMENTS.register(uses=("features",), tuples=sink_tuples)
def align_partial(problem: Problem, settings: MatchSettings) -> Alignment:
    """Exact transport of the units that are shared. settings.features: what they are compared by."""
    return align_transport(problem, settings)


def leave_sink(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At which price each row leaves the sink, and the column that does so with it: int64 (k,) and float64 (k,).

    cost: (k, k), non-negative. Successive shortest paths: the rows and columns of the r lowest prices are those of the
    cheapest r pairs there are, and the prices add up to what these cost.
    """
    k, every = len(cost), np.arange(len(cost))
    u, v = np.zeros(k), np.zeros(k)  # how far rows and columns are from the rows in the sink
    row_of, column_of = np.full(k, -1), np.full(k, -1)  # of each column, of each row; -1 in the sink
    columns, price = np.empty(k, dtype=np.int64), np.empty(k)
    nearest = cost.argmin(0)  # row in the sink, of each column
    for _ in range(k):
        before = nearest.copy()  # the row in front of each column on the shortest path to it
        far = cost[nearest, every] - v
        seen = np.zeros(k, dtype=bool)
        while True:
            j = int(np.where(seen, np.inf, far).argmin())
            seen[j] = True
            i = row_of[j]
            if i < 0:
                break
            through = far[j] + cost[i] + u[i] - v
            shorter = ~seen & (through < far)
            far[shorter], before[shorter] = through[shorter], i
        v += np.minimum(far, far[j])
        end = j
        while j >= 0:
            i = before[j]
            row_of[j], column_of[i], j = i, j, column_of[i]
        columns[i], price[i] = end, v[end]
        paired = column_of >= 0
        u[paired] = v[column_of[paired]] - cost[paired, column_of[paired]]
        left = np.flatnonzero(~paired)
        stale = np.flatnonzero(nearest == i)
        if len(left) and len(stale):
            nearest[stale] = left[cost[np.ix_(left, stale)].argmin(0)]
    return columns, price
