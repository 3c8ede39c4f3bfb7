"""Where units lie while a graph is laid out: every entry of a value says which unit it belongs to.

An entry's *label* is the number of its unit, ``NONE`` where it has none (zeros that were padded, a table). Labels are
those of one image, and a value's labels have extent 1 on every dimension along which they do not vary. What moves
entries about (rearrange, slice, pad, concatenate, select) moves labels about by the same code, so that heads, channel
shuffle, windows, chunks and flatten need no rules of their own. Three relations between units are recorded:

- two units are *tied* (they must be permuted together): what is joined elementwise, what a contraction pairs;
- a unit is *inside* another: the channels of a head, of a group of a convolution or of a norm, stay together;
- a unit lies at *places*: entries of dimensions of parameters.

From them ``stages.core.graph.resolve`` computes the groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError

NONE = -1
HELD_NAME = ".held"  # how the names of units end that a held operation gives


class SeveralDimensionsError(InputError):
    """A value has units on more than one dimension, or on others than are read."""


@dataclass(frozen=True)
class Value:
    """labels: int64, broadcasts to ``shape``. dims: the dimensions units lie on, ascending.

    common: whether it is computed from the input alone, and so is the same in every network. across: labels of units
    that lie on one more dimension, the same for all of the others (stages.core.graph.mixing); extent 1 elsewhere.
    beside: of a product of units with units, labels of those on its last dimension (stages.core.graph.crossed). even:
    whether all its entries are one number, as those of a state of zeros. held: whether it is of units that no rule
    keeps in another order than they have (stages.core.graph.held).
    """

    labels: Tensor
    dims: tuple[int, ...]
    shape: torch.Size
    common: bool = False
    across: Tensor | None = None
    beside: Tensor | None = None
    even: bool = False
    held: bool = False

    @property
    def full(self) -> Tensor:
        return self.labels.expand(self.shape)

    def along(self, dim: int) -> Tensor:
        """Labels along the one dimension that has units: (extent,)."""
        return self.labels.expand(
            *[self.shape[d] if d == dim else 1 for d in range(len(self.shape))]
        ).reshape(-1)


def compact(labels: Tensor, shape: torch.Size, dims: Sequence[int] = (), common: bool = False) -> Value:
    """A value from the labels of all its entries. dims: those that hold units whether labels vary there or not."""
    found = set(dims)
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels
        if labels.shape[dim] > 1 and bool((labels != first).any()):
            found.add(dim)
        else:
            labels = first
    return Value(labels.contiguous(), tuple(sorted(found)), shape, common)


@dataclass
class Units:
    """All units of a network, and what was found about them."""

    count: int = 0
    origins: list[tuple[str, int, int]] = field(default_factory=list)  # name, first unit, number
    ties: list[tuple[Tensor, Tensor, str]] = field(default_factory=list)
    inside: list[tuple[Tensor, Tensor, str]] = field(default_factory=list)  # unit, the one it is inside, node
    places: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    kernels: dict[str, Tensor] = field(
        default_factory=dict
    )  # grouped weight -> (parts, size) units its rows read
    beside: list[list[Tensor]] = field(default_factory=list)  # labels of the values that are put side by side
    fixed: list[Tensor] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)  # (parts, size): the order inside is one for all parts
    across: list[Tensor] = field(default_factory=list)  # (1,): the whole of what lies across other units
    common: list[Tensor] = field(default_factory=list)  # a head of those with common keys
    hints: list[tuple[Tensor, str]] = field(default_factory=list)  # units, the end of their group's name

    def new(self, size: int, name: str) -> Tensor:
        """Units that were not there before: int64 (size,)."""
        self.origins.append((name, self.count, size))
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, node: str, a: Tensor, b: Tensor) -> None:
        """a, b: labels of one shape. Where either has no unit there is nothing to tie."""
        both = (a != NONE) & (b != NONE)
        if bool(both.any()):
            self.ties.append((a[both], b[both], node))

    def put_inside(self, node: str, parts: Tensor, outer: Tensor) -> None:
        """parts: labels (P, ...), those of each part; outer: (P,) the units they are inside."""
        rows = [own.unique() for own in parts.flatten(1)]
        rows = [own[own != NONE] for own in rows]
        if all(len(own) == 1 for own in rows):  # parts of one unit
            self.tie(node, torch.cat(rows), outer)
            return
        self.inside.append(
            (torch.cat(rows), outer.repeat_interleave(torch.tensor([len(own) for own in rows])), node)
        )

    def share_parts(self, rows: Tensor) -> bool:
        """Whether what lies in different ones of some rows, labels (K, ...), is known to be inside one part."""
        if not self.inside:
            return False
        child, parent = (torch.cat(own) for own in zip(*(own[:2] for own in self.inside), strict=True))
        of = torch.full((self.count + 1,), NONE)  # the last for entries of no unit
        of[child] = parent
        lines = [own.unique() for own in of[rows.flatten(1)]]
        found = torch.cat([own[own != NONE] for own in lines])
        return len(found.unique()) < len(found)

    def place(self, node: str, parameter: str, dim: int, labels: Tensor) -> None:
        """A parameter's dimension has these units. One that is used twice has both, which are tied."""
        known = self.places.setdefault((parameter, dim), labels)
        if known is not labels:
            if known.shape != labels.shape:
                raise InputError(f"{node}: {parameter} is used again on other units; allowed: the same ones")
            self.tie(node, known, labels)
            self.places[parameter, dim] = torch.where(known == NONE, labels, known)  # zeros the other time


def join(units: Units, node: str, a: Value, b: Value, shape: torch.Size, places: bool = False) -> Value:
    """What is elementwise of two values: units are tied, or inside one another where one value is coarser.

    places: whether the shapes are those of the values: a coarser one has other entries wherever its extent says.
    """
    a, b = _ranked(a, shape), _ranked(b, shape)
    dims, common = tuple(sorted({*a.dims, *b.dims})), a.common and b.common
    for one, other in ((a, b), (b, a)):
        if one.held and not other.common:
            meets = other.held or any(one.shape[d] > 1 for d in other.dims)
            units.fixed += [other.labels] if meets else []
            return Value(other.labels, other.dims, shape, held=meets)
    for one, other in ((a, b), (b, a)):
        if not one.dims or (one.common and not other.common and not _varies(one, other.dims)):
            meets = one.common and not one.even and not other.common
            if meets and any(one.shape[d] > 1 for d in other.dims):
                units.fixed.append(other.labels)  # each meets a feature of the input of its own
            return Value(other.labels, other.dims, shape, common)
    extent = [shape[d] if max(a.labels.shape[d], b.labels.shape[d]) > 1 else 1 for d in range(len(shape))]
    x, y = a.labels.expand(extent), b.labels.expand(extent)
    if a.dims != b.dims:
        single = [own.labels.numel() == 1 for own in (a, b)]  # one head: on whatever dimension it is
        coarse, fine = (x, y) if set(a.dims) < set(b.dims) or single == [True, False] else (y, x)
        if not (set(a.dims) < set(b.dims) or set(b.dims) < set(a.dims) or any(single)):
            if set(a.dims) & set(b.dims):
                return _of_places(units, node, a, b, shape)
            few, many = (a, b) if _is_kernel(a, b) else (b, a)
            units.fixed.append(few.labels)  # one for each of several places: experts, taps of a kernel
            return Value(many.labels, many.dims, shape, common)
        whole = a if coarse is x else b
        apart = places and any(whole.shape[d] > 1 for d in dims if d not in whole.dims)
        if apart and not any(single) and not whole.common:
            # paths of selective kernels: what weighs a unit at several places is there for each of them, in their order
            units.tie(node, fine, coarse)
            return Value(whole.labels, whole.dims, shape, common)
        _nest(units, node, coarse, fine)
        return Value(fine.contiguous(), dims, shape, common)
    if a.labels.shape != b.labels.shape and a.labels.numel() != b.labels.numel():
        coarse, fine = (x, y) if a.labels.numel() < b.labels.numel() else (y, x)
        _nest(units, node, coarse, fine)
        return Value(fine.contiguous(), dims, shape, common)
    units.tie(node, x, y)
    return Value(torch.where(x == NONE, y, x), dims, shape, common)


def _is_kernel(a: Value, b: Value) -> bool:
    """Of units on different dimensions, whether those of ``a`` meet places of ``b``, each of whose units meets all."""
    broadcast = [all(own.shape[d] == 1 for d in other.dims) for own, other in ((a, b), (b, a))]
    return broadcast[0] if broadcast[0] != broadcast[1] else a.labels.numel() <= b.labels.numel()


def _of_places(units: Units, node: str, a: Value, b: Value, shape: torch.Size) -> Value:
    """Units inside parts that both have, where those of one value meet places of the other: kernels made for each
    place (involution). They keep their order there; the other's are what is left."""
    parts = sorted(set(a.dims) & set(b.dims))
    for kernel, other in ((a, b), (b, a)):
        inside = [d for d in kernel.dims if d not in parts]
        broadcast = all(kernel.shape[d] == 1 for d in other.dims if d not in parts)
        if len(parts) == len(inside) == 1 and broadcast and len(other.dims) == 2:
            break
    else:
        raise InputError(f"{node}: joins values whose units do not lie alike; allowed: equal layouts")
    rows = [value.labels.movedim(parts[0], 0).flatten(1) for value in (kernel, other)]
    outer = units.new(max(map(len, rows)), f"{node}.parts")
    for own in rows:
        units.put_inside(node, own.expand(len(outer), -1), outer)
    units.pinned.append(rows[0])
    return Value(other.labels, other.dims, shape, a.common and b.common)


def _ranked(value: Value, shape: torch.Size) -> Value:
    missing = len(shape) - value.labels.dim()
    ahead = [1] * missing
    labels = value.labels.reshape(ahead + list(value.labels.shape))
    own = torch.Size([*ahead, *value.shape])
    dims = tuple(d + missing for d in value.dims)
    return Value(labels, dims, own, value.common, even=value.even, held=value.held)


def _varies(value: Value, dims: Sequence[int]) -> bool:
    return any(value.labels.shape[d] > 1 for d in dims)


def _nest(units: Units, node: str, coarse: Tensor, fine: Tensor) -> None:
    """Units of ``fine`` are inside those of ``coarse``, entry by entry."""
    outer = coarse.unique()
    outer = outer[outer != NONE]
    rows = [fine[coarse == own].unique() for own in outer]
    widest = max((len(own) for own in rows), default=0)
    parts = torch.full((len(rows), widest), NONE)
    for row, own in zip(parts, rows, strict=True):
        row[: len(own)] = own
    units.put_inside(node, parts, outer)
