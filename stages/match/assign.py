"""Assignments between the units of N networks.

Units can lie in parts (heads, groups of a convolution or a norm), which change places as a whole. What part a is worth
in the place of part b is then what the best order inside that pair is worth; over parts it is an assignment of these
(Xu et al. 2024, MuDSC). Groups without such structure are parts of one unit each.
"""

from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PRICED = 10  # rounds of prices behind an assignment: they need not be exact


def assign(gain: Tensor) -> Tensor:
    """gain (d, d): of letting unit j (column) play the part of unit i (row). Returns int64 (d,): the best j for i."""
    _, columns = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(np.ascontiguousarray(columns))


class Assigner:
    """Solves assignments one after the other, of gains that differ little, each exactly.

    What is taken off a whole column changes no assignment, but decides how far the solver searches. First it is its
    mean, as gains of weights that are all about as large share one component; then the prices of the columns
    under which each unit nearly has the best one already (dual variables of the last assignment, Bertsekas 1988).
    """

    def __init__(self) -> None:
        self.prices: np.ndarray | None = None

    def __call__(self, gain: Tensor) -> Tensor:
        """As ``assign``."""
        gains = gain.double().cpu().numpy()
        reduced = gains - (gains.mean(0) if self.prices is None else self.prices)
        _, columns = linear_sum_assignment(reduced, maximize=True)
        self.prices = self._priced(gains, columns)
        return torch.from_numpy(np.ascontiguousarray(columns))

    def _priced(self, gains: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Raises prices until nobody would rather have another column, (d,), or as often as ``PRICED``."""
        own = gains[np.arange(len(gains)), columns]
        prices = np.zeros(len(gains)) if self.prices is None else self.prices
        for _ in range(PRICED):
            wanted = np.maximum(prices, (gains + (prices[columns] - own)[:, None]).max(0, initial=-np.inf))
            if np.array_equal(wanted, prices):
                break
            prices = wanted
        return prices


def part_pairs(gain: Tensor, parts: int) -> Tensor:
    """gain (parts * size, parts * size) of pairs of units, as (parts, parts, size, size): pairs of parts first."""
    return gain.unflatten(1, (parts, -1)).unflatten(0, (parts, -1)).transpose(1, 2)


def assign_inside(gains: Tensor) -> Tensor:
    """gains (..., size, size) -> the best order of each: int64 (..., size)."""
    size = gains.shape[-1]
    if size == 1:
        return torch.zeros(gains.shape[:-1], dtype=torch.int64)
    costs = -gains.reshape(-1, size, size).double().cpu().numpy()
    columns = [linear_sum_assignment(own)[1] for own in costs]
    return torch.from_numpy(np.array(columns, dtype=np.int64)).view(gains.shape[:-1])


def gained(gains: Tensor, orders: Tensor) -> Tensor:
    """What orders (..., size) are worth: gains (..., size, size) -> (...)."""
    return gains.gather(-1, orders[..., None]).sum((-1, -2))


def assign_parts(
    gains: Mapping[str, Tensor], parts: int, fixed: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The best order of parts, and of the units inside them.

    gains {what: (parts * size, parts * size)}: of pairs of units, for each kind of unit that the parts hold; they add
    up. fixed: parts stay in place. Returns int64 (parts,) and {what: (parts, size)}, the latter in the order of the
    former.
    """
    pairs = {what: part_pairs(gain, parts) for what, gain in gains.items()}
    inside = {what: assign_inside(own) for what, own in pairs.items()}
    every = torch.arange(parts)
    order = every if fixed else assign(sum(gained(pairs[what], inside[what]) for what in pairs))
    return order, {what: own[every, order] for what, own in inside.items()}


def assign_parts_jointly(
    similarities: Mapping[str, Tensor], parts: int, sweeps: int = 100, fixed: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Match the units of N networks at once, network 0 being the reference.

    similarities {what: (N, N, parts * size, parts * size)}: of every two networks' units, for each kind of unit that
    the parts hold. Maximises their sum over pairs of networks and matched units: each network in turn is matched to
    the others until nothing moves (one step, and exact, for two networks). Returns int64 (N, parts) and {what: (N,
    parts, size)} as ``assign_parts`` does.
    """
    networks = len(next(iter(similarities.values())))
    units = torch.arange(parts).repeat(networks, 1)
    sizes = {what: own.shape[-1] // parts for what, own in similarities.items()}
    inside = {what: torch.arange(size).repeat(networks, parts, 1) for what, size in sizes.items()}

    def improve(m: int, others: list[int]) -> None:
        gains = {
            what: sum(own[n, m][_flat(units[n], inside[what][n])] for n in others)
            for what, own in similarities.items()
        }
        order, rows = assign_parts(gains, parts, fixed)
        new = _worth(gains, order, rows)
        if new > _worth(gains, units[m], {what: own[m] for what, own in inside.items()}) + 1e-12:
            units[m] = order
            for what, own in rows.items():
                inside[what][m] = own

    for m in range(1, networks):
        improve(m, list(range(m)))
    for _ in range(sweeps if networks > 2 else 0):
        before = [units.clone(), *(own.clone() for own in inside.values())]
        for m in range(1, networks):
            improve(m, [n for n in range(networks) if n != m])
        if all(map(torch.equal, before, [units, *inside.values()])):
            break
    return units, inside


def _flat(order: Tensor, inside: Tensor) -> Tensor:
    return (order[:, None] * inside.shape[1] + inside).reshape(-1)


def _worth(gains: Mapping[str, Tensor], order: Tensor, inside: Mapping[str, Tensor]) -> float:
    flat = {what: _flat(order, own) for what, own in inside.items()}
    return sum(float(gains[what][torch.arange(len(own)), own].sum()) for what, own in flat.items())
