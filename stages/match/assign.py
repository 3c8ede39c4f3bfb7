"""Assignments between the units of N networks."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(gain: Tensor) -> Tensor:
    """gain (d, d): of letting unit j (column) play the part of unit i (row). Returns int64 (d,): the best j for i."""
    _, columns = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(np.ascontiguousarray(columns))


def assign_jointly(similarities: Tensor, sweeps: int = 100) -> Tensor:
    """Match N networks at once, network 0 being the reference.

    similarities (N, N, d, d) as from ``similarity``. Maximises the sum over pairs of networks of the similarity of
    matched units: each network in turn is matched to the sum of the others until nothing moves (one step, and
    exact, for two networks). Returns int64 (N, d).
    """
    networks, _, d, _ = similarities.shape
    units = torch.arange(d).repeat(networks, 1)
    for m in range(1, networks):
        gain = sum(similarities[n, m][units[n]] for n in range(m))
        units[m] = assign(gain)
    for _ in range(sweeps if networks > 2 else 0):
        before = units.clone()
        for m in range(1, networks):
            gain = sum(similarities[n, m][units[n]] for n in range(networks) if n != m)
            new = assign(gain)
            rows = torch.arange(d)
            if gain[rows, new].sum() > gain[rows, units[m]].sum() + 1e-12:
                units[m] = new
        if torch.equal(units, before):
            break
    return units
