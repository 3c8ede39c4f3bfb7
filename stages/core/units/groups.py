"""The vocabulary of merging: axes, permutation groups, matchings and unit splits.

A *unit* is one channel or neuron. A *group* is a set of units that several parameters share: permuting all of its
axes together leaves the network's function alone (Ainsworth et al. 2023, section 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError

State = Mapping[str, Tensor]


@dataclass(frozen=True, order=True)
class Axis:
    """One dimension of one parameter or buffer."""

    parameter: str
    dim: int

    def __str__(self) -> str:
        return f"{self.parameter}[{self.dim}]"


@dataclass(frozen=True, order=True)
class Span:
    """Where a group lies on an axis: unit j is the entries ``start + j * block`` to ``start + (j + 1) * block``.

    ``block`` is more than 1 behind a flatten (one unit is a whole map); ``start`` is more than 0 behind a
    concatenation.
    """

    axis: Axis
    start: int = 0
    block: int = 1


@dataclass(frozen=True)
class PermutationGroup:
    """``size`` units and every place they occupy. A fixed group (images, logits) is never permuted."""

    name: str
    size: int
    spans: tuple[Span, ...]
    fixed: bool = False


@dataclass(frozen=True)
class Inner:
    """The order of units inside the parts (heads, groups of a grouped convolution) that are the units of ``outer``.

    Each of ``parts`` parts holds ``size`` units, which may be permuted there, differently in every part. On a span,
    unit c of part p is the entries ``start + (p * size + c) * block`` and on. ``inside``: weights of grouped maps,
    (parts * rows, size, ...), whose rows each read the units of their own part.
    """

    name: str
    outer: str
    parts: int
    size: int
    spans: tuple[Span, ...]
    inside: tuple[str, ...] = ()


@dataclass(frozen=True)
class PermutationSpec:
    """The groups of one architecture, by name, in the order of the forward pass; inner: orders inside their units."""

    groups: Mapping[str, PermutationGroup]
    inner: Mapping[str, Inner] = field(default_factory=dict)

    @property
    def free(self) -> dict[str, PermutationGroup]:
        """The groups that may be permuted and split."""
        return {name: group for name, group in self.groups.items() if not group.fixed}

    @property
    def ordered(self) -> dict[str, PermutationGroup]:
        """The groups that have something to put in order: the free ones, then fixed ones with orders inside."""
        outer = {inner.outer for inner in self.inner.values()}
        return self.free | {name: group for name, group in self.groups.items() if name in outer}

    def contents(self, name: str) -> tuple[Inner, ...]:
        """What the units of a group consist of: the units inside them, and what lies on them as a whole.

        The latter is told as an ``Inner`` of the group's own name whose parts hold one unit each. It is all there is
        of a group without orders inside.
        """
        group = self.groups[name]
        inside = tuple(inner for inner in self.inner.values() if inner.outer == name)
        places = {(span.axis, span.start) for inner in inside for span in inner.spans}
        whole = tuple(span for span in group.spans if (span.axis, span.start) not in places)
        if group.fixed or (inside and not whole):
            return inside
        return (*inside, Inner(name, name, group.size, 1, whole))

    def tables(self, name: str, order: Tensor, inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The order of a group's units, and of what they consist of, as tables of a ``Matching``."""
        tables = {inner: own for inner, own in inside.items() if inner in self.inner}
        return tables if self.groups[name].fixed else {name: order, **tables}


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


def span_index(order: Tensor, span: Span) -> Tensor:
    """Entries of an axis in the order that ``order`` (d units) asks for: int64 (d * block,)."""
    return (span.start + order[:, None] * span.block + torch.arange(span.block, device=order.device)).reshape(
        -1
    )


def permute(state: State, spec: PermutationSpec, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reorder units: entry j of every axis of group g comes from entry ``orders[g][j]``. Groups left out stay.

    Orders of groups are int64 (d,); those inside parts (parts, size), in the order that the parts have then.
    """
    result = dict(state)
    for name in (name for name in orders if name not in spec.inner):
        _reorder(result, spec.groups[name].spans, orders[name])
    for name in (name for name in orders if name in spec.inner):
        inner, order = spec.inner[name], orders[name]
        every = torch.arange(inner.parts, device=order.device)[:, None] * inner.size + order
        _reorder(result, inner.spans, every.reshape(-1))
        for parameter in inner.inside:
            result[parameter] = reorder_inside(result[parameter], order)
    return result


def _reorder(state: dict[str, Tensor], spans: Sequence[Span], order: Tensor) -> None:
    for span in spans:
        tensor = state[span.axis.parameter]
        index = span_index(order.to(tensor.device), span)
        whole = torch.arange(tensor.shape[span.axis.dim], device=tensor.device)
        whole[span.start : span.start + len(index)] = index
        state[span.axis.parameter] = tensor.index_select(span.axis.dim, whole)


def reorder_inside(weight: Tensor, order: Tensor) -> Tensor:
    """weight: (parts * rows, size, ...); order: (parts, size). Each part's rows read their units in its order."""
    parts, size = order.shape
    apart = weight.reshape(parts, -1, size, *weight.shape[2:])
    rows = torch.arange(parts, device=weight.device)[:, None]
    return apart.movedim(2, 1)[rows, order.to(weight.device)].movedim(1, 2).reshape(weight.shape)


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
