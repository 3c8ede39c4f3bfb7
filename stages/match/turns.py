"""Kernels of grouped convolutions, which have units of one part on both their axes, are put in order by turns.

They are linear in the order of either axis but not of both: each pair of parts starts from what the other weights say,
and keeps the order it has where that is better (stages.match.weights).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.match.assign import assign_inside, gained

TURNS = 50  # at most, inside one pair of parts; each gains, and few are needed
PAIRS = 64  # of parts that are solved side by side
CANDIDATES = 8  # for each part that are solved by turns; the others keep the order they start from


@dataclass(frozen=True)
class Kernel:
    """The kernel of a grouped convolution as seen from the units on one of its axes: (parts, size, across, taps).

    unit, across: whose units lie on the second and third dimension; across is None where these are not to be ordered.
    mine is in the network's own order, theirs, of all other networks, in the reference's.
    """

    unit: str
    across: str | None
    theirs: Tensor
    mine: Tensor

    def gain(self, a: Tensor, b: Tensor, orders: Mapping[str, Tensor]) -> Tensor:
        """Of units of parts b in the place of those of parts a, given the orders (K, across): (K, size, size)."""
        mine = self.mine[b]
        if self.across is not None:
            index = orders[self.across][:, None, :, None].expand(-1, *self.mine.shape[1:])
            mine = mine.gather(2, index)
        return self.theirs[a].flatten(2) @ mine.flatten(2).mT


Kernels = Sequence[tuple[Kernel, Kernel | None]]


def solve_pairs(
    gains: Mapping[str, Tensor], kernels: Kernels, parts: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Every pair of parts from the order that is best without the kernels; the most promising are improved by turns.

    Returns {what: (parts, parts, size)} and what these are worth, (parts, parts).
    """
    a, b = torch.cartesian_prod(torch.arange(parts), torch.arange(parts)).unbind(1)
    orders = {what: assign_inside(gain[a, b]) for what, gain in gains.items()}
    worth = torch.cat([worth_of(gains, kernels, a[i], b[i], _of(orders, i)) for i in _batches(len(a))])
    chosen = _promising(worth.view(parts, parts)).flatten().nonzero().flatten()
    for at in _batches(len(chosen)):
        i = chosen[at]
        turned, worth[i] = take_turns(gains, kernels, a[i], b[i], _of(orders, i))
        for what, own in turned.items():
            orders[what][i] = own
    return {what: own.view(parts, parts, -1) for what, own in orders.items()}, worth.view(parts, parts)


def _of(orders: Mapping[str, Tensor], pairs: Tensor) -> dict[str, Tensor]:
    return {what: own[pairs] for what, own in orders.items()}


def _batches(count: int) -> Sequence[Tensor]:
    return torch.arange(count).split(PAIRS)


def _promising(worth: Tensor) -> Tensor:
    """For each part, as row or column, the CANDIDATES that are worth most: bool (parts, parts)."""
    most = min(CANDIDATES, len(worth))
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    chosen.scatter_(1, worth.topk(most, 1).indices, True)
    return chosen.scatter_(0, worth.topk(most, 0).indices, True)


def take_turns(
    gains: Mapping[str, Tensor], kernels: Kernels, a: Tensor, b: Tensor, start: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Improve the orders inside parts b, (K, size) for each kind of unit, in the place of parts a, kind by kind.

    Each pair until its own turn gains nothing, so that it ends the same whichever pairs are beside it.
    """
    orders = {what: own.clone() for what, own in start.items()}
    seen = [own for pair in kernels for own in pair if own is not None]
    worth, left = worth_of(gains, kernels, a, b, orders), torch.arange(len(a))
    for _ in range(TURNS):
        a_left, b_left, before = a[left], b[left], worth[left]
        tried = {what: own[left] for what, own in orders.items()}
        for what, gain in gains.items():
            whole = gain[a_left, b_left]
            whole = whole + sum(own.gain(a_left, b_left, tried) for own in seen if own.unit == what)
            tried[what] = assign_inside(whole)
        worth[left] = worth_of(gains, kernels, a_left, b_left, tried)
        for what, own in tried.items():
            orders[what][left] = own
        left = left[worth[left] > before + 1e-12 * before.abs()]
        if not len(left):
            break
    return orders, worth


def worth_of(
    gains: Mapping[str, Tensor], kernels: Kernels, a: Tensor, b: Tensor, orders: Mapping[str, Tensor]
) -> Tensor:
    """What parts b in these orders give in the place of parts a: (K,)."""
    linear = sum(gained(gain[a, b], orders[what]) for what, gain in gains.items())
    return linear + sum(gained(read.gain(a, b, orders), orders[read.unit]) for read, _ in kernels)
