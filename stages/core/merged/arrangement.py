"""How the units of N networks are arranged in the values of one merged network.

A value holds, for each group along its unit dimension, the units in the order
[separate of network 0 | shared | separate of network 1 | separate of network 2 | ...], so that the views of the
first two networks are contiguous slices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph.layouts import Layout, Segment


@dataclass(frozen=True)
class Arrangement:
    """How the source networks' entries lie in a merged value.

    positions: for each network, int64 (source width,): where its entry c is. owner: int64 (merged width,): the
    network an entry belongs to, -1 for shared.
    """

    positions: tuple[Tensor, ...]
    owner: Tensor

    @property
    def width(self) -> int:
        return len(self.owner)

    def view(self, network: int) -> Tensor:
        """The entries one network reads, ascending."""
        return torch.sort(self.positions[network]).values


def shared_units(segment: Segment, shared: Mapping[str, int]) -> int:
    """How many units of a segment are shared: those of its group's first ``shared`` that are in it."""
    k = shared.get(segment.group, segment.first + segment.size)
    return min(max(k - segment.first, 0), segment.size)


def unit_keys(layout: Layout, shared: Mapping[str, int], networks: int, numbers: dict[str, int]) -> Tensor:
    """A number for each entry of a merged value, the same for entries of one unit of one owner, in any value.

    numbers: of groups, filled in as they are met. What belongs to no group is -1.
    """
    keys = []
    for segment in layout.segments:
        k, g = shared_units(segment, shared), numbers.setdefault(segment.group, len(numbers))
        units = (g << 32) + segment.first + torch.arange(segment.size)
        own = [units[k:] * (networks + 1) + m + 1 for m in range(networks)]
        line = torch.cat([own[0], units[:k] * (networks + 1), *own[1:]])
        line = line.repeat_interleave(segment.block)
        keys.append(line if segment.group else torch.full_like(line, -1))
    return torch.cat(keys)


def arrange(layout: Layout, shared: Mapping[str, int], networks: int) -> Arrangement:
    """Arrangement of a value. ``shared``: k of each free group; a group that is not named is shared whole."""
    positions: list[list[Tensor]] = [[] for _ in range(networks)]
    owner, start = [], 0
    for segment in layout.segments:
        k, b = shared_units(segment, shared), segment.block
        s = segment.size - k
        for m in range(networks):
            own = start + (0 if m == 0 else k * b + m * s * b) + torch.arange(s * b)
            positions[m] += [start + s * b + torch.arange(k * b), own]
        owner += [torch.zeros(s * b), torch.full((k * b,), -1.0)]
        owner += [torch.full((s * b,), float(m)) for m in range(1, networks)]
        start += (k + networks * s) * b
    return Arrangement(tuple(torch.cat(p) for p in positions), torch.cat(owner).long())


def arrange_heads(classes: Sequence[int]) -> Arrangement:
    """Arrangement of the logits of separate label spaces: the networks' classes side by side."""
    starts = torch.tensor([0, *classes]).cumsum(0)
    positions = tuple(start + torch.arange(n) for start, n in zip(starts, classes, strict=False))
    return Arrangement(positions, torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(classes)))


@dataclass(frozen=True)
class Piece:
    """Entries ``start:stop`` of a value, all of one owner."""

    owner: int
    start: int
    stop: int


def pieces_of(arrangement: Arrangement) -> list[Piece]:
    """A value cut where the owner changes."""
    owners, counts = torch.unique_consecutive(arrangement.owner, return_counts=True)
    stops = counts.cumsum(0).tolist()
    return [
        Piece(owner, stop - count, stop)
        for owner, count, stop in zip(owners.tolist(), counts.tolist(), stops, strict=True)
    ]


def held_pieces(arrangement: Arrangement) -> list[Piece]:
    """The pieces in which a value is held while the network runs.

    Where nothing is shared, each network's entries stay apart, and the networks run as they would alone. Elsewhere
    the value is one tensor: most rows read all of it.
    """
    whole = bool((arrangement.owner < 0).any())
    return [Piece(-1, 0, arrangement.width)] if whole else pieces_of(arrangement)
