"""Where the units of a value lie: one dimension, and the groups side by side on it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """``size`` units of a group side by side, from unit ``first`` on, each ``block`` entries wide.

    What belongs to no group (zeros beside a stream, a mask) has an empty name; it is the same in every network.
    """

    group: str
    size: int
    block: int = 1
    first: int = 0

    @property
    def entries(self) -> int:
        return self.size * self.block


@dataclass(frozen=True)
class Layout:
    """The dimension of a value that holds units, and what lies along it."""

    dim: int
    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        return sum(segment.entries for segment in self.segments)

    def blocks(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Entries of one unit of each group that lies here as a whole. sizes: units of each group."""
        entries: dict[str, int] = {}
        for segment in self.segments:
            entries[segment.group] = entries.get(segment.group, 0) + segment.entries
        return {name: count // sizes[name] for name, count in entries.items() if name in sizes}

    def places(self, group: str, size: int) -> list[Tensor]:
        """Where the units of a group begin, each time that all of them lie here: int64 (size * block,) each."""
        found: list[dict[int, Tensor]] = []
        start = 0
        for s in self.segments:
            if s.group == group:
                rows = start + torch.arange(s.entries).view(s.size, s.block)
                home = next((own for own in found if s.first not in own), None)
                if home is None:
                    found.append(home := {})
                home |= {s.first + i: row for i, row in enumerate(rows)}
            start += s.entries
        return [torch.cat([own[i] for i in range(size)]) for own in found if len(own) == size]
