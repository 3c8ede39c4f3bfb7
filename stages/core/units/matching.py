"""Which units of several networks belong together, and which of them share a merged unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError
from stages.core.units.groups import Inner, PermutationSpec


@dataclass(frozen=True)
class Matching:
    """Which unit of each network plays the part of each unit of the reference (network 0).

    units: {group: int64 (N, d)}; ``units[g][m, j]`` is a unit of network m, row 0 is 0..d-1. Orders inside parts are
    optional, {inner: int64 (N, parts, size)}: ``units[i][m, j]`` orders the part of network m that plays part j.
    similarity: {group: float64 (N, d)} of each pair with the reference, 1 for the reference itself.
    """

    units: Mapping[str, Tensor]
    similarity: Mapping[str, Tensor]


@dataclass(frozen=True)
class UnitSplit:
    """Which units of the reference are shared and which stay separate: two index lists that cover 0..d-1."""

    shared: tuple[int, ...]
    separate: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.shared) + len(self.separate)

    @property
    def fraction(self) -> float:
        """Separate fraction r = 1 - k/d."""
        return len(self.separate) / self.size

    def width(self, networks: int) -> int:
        """Merged width k + N (d - k)."""
        return len(self.shared) + networks * len(self.separate)


def inside_order(units: Mapping[str, Tensor], inner: Inner, network: int) -> Tensor:
    """Which unit of a network plays each unit of the reference: int64 (parts * size,), over all parts.

    units: tables as in ``Matching``; where one is missing, units stay in their places.
    """
    parts, rows = torch.arange(inner.parts), torch.arange(inner.size).expand(inner.parts, -1)
    if inner.outer in units:
        parts = units[inner.outer][network]
    if inner.name != inner.outer and inner.name in units:
        rows = units[inner.name][network]
    return (parts[:, None] * inner.size + rows).reshape(-1)


def unit_order(
    matching: Matching, splits: Mapping[str, UnitSplit], network: int, spec: PermutationSpec | None = None
) -> dict[str, Tensor]:
    """For each group the units of one network, shared ones first, in the matching's order.

    With ``spec``, also the orders inside parts that the matching knows.
    """
    merged = {name: list(split.shared) + list(split.separate) for name, split in splits.items()}
    orders = {name: matching.units[name][network][order] for name, order in merged.items()}
    for name, inner in spec.inner.items() if spec is not None else ():
        if name in matching.units:
            units = matching.units[name][network]
            orders[name] = units[merged[inner.outer]] if inner.outer in merged else units
    return orders


def check_matching(matching: Matching, spec: PermutationSpec, networks: int) -> None:
    """Raise InputError unless every free group has one permutation of its units for each network.

    The reference's own, row 0, must be the identity, also inside parts.
    """
    for name, group in spec.free.items():
        units = matching.units.get(name)
        if units is None:
            raise InputError(f"matching: group {name} is missing; allowed: one row of units per network")
        if len(units) != networks:
            raise InputError(
                f"matching: group {name} has {len(units)} rows; allowed: {networks}, one per network"
            )
        expected = torch.arange(group.size)
        for network, row in enumerate(units):
            if not torch.equal(torch.sort(row.cpu()).values, expected):
                raise InputError(
                    f"matching: group {name}, network {network}: not a permutation of its {group.size} units"
                )
        _check_reference(name, units[0], expected)
    for name, inner in spec.inner.items():
        if name not in matching.units:
            continue
        units, expected = matching.units[name], torch.arange(inner.size)
        if units.shape != (networks, inner.parts, inner.size) or not bool(
            (torch.sort(units.cpu(), -1).values == expected).all()
        ):
            raise InputError(
                f"matching: {name}: found {tuple(units.shape)}; allowed: for each of {networks} networks and "
                f"{inner.parts} parts a permutation of {inner.size} units"
            )
        _check_reference(name, units[0], expected.expand(inner.parts, -1))


def _check_reference(name: str, units: Tensor, expected: Tensor) -> None:
    if not torch.equal(units.cpu(), expected):
        raise InputError(
            f"matching: {name}, network 0: found another order than its own; allowed: the reference as it is"
        )


def check_splits(splits: Mapping[str, UnitSplit], spec: PermutationSpec) -> None:
    """Raise InputError unless every free group has a split that covers its units once."""
    for name, group in spec.free.items():
        if name not in splits:
            raise InputError(
                f"split: group {name} is missing; allowed: shared and separate units of every group"
            )
        if sorted(splits[name].shared + splits[name].separate) != list(range(group.size)):
            raise InputError(f"split: group {name}: its lists do not cover its {group.size} units once")


def identity_matching(spec: PermutationSpec, networks: int) -> Matching:
    """Unit j of every network plays the part of unit j."""
    units = {name: torch.arange(g.size).repeat(networks, 1) for name, g in spec.free.items()}
    return Matching(units, {name: torch.ones(u.shape, dtype=torch.float64) for name, u in units.items()})


def full_split(
    spec: PermutationSpec, shared: Mapping[str, Sequence[int]] | None = None
) -> dict[str, UnitSplit]:
    """Splits that share the listed units of each free group (all of them by default)."""
    splits = {}
    for name, group in spec.free.items():
        kept = tuple(range(group.size)) if shared is None else tuple(sorted(shared[name]))
        splits[name] = UnitSplit(kept, tuple(sorted(set(range(group.size)) - set(kept))))
    return splits
