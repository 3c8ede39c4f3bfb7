"""Units, axes and permutation groups.

A *unit* is one channel or neuron. A *group* is a set of units that several parameters share: permuting all of its
axes together leaves the network's function alone (Ainsworth et al. 2023, section 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    concatenation. Where units do not follow each other (behind a channel shuffle), ``entries`` says where each begins.
    """

    axis: Axis
    start: int = 0
    block: int = 1
    entries: tuple[int, ...] = ()


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
        within = {(span.axis, span.start) for inner in inside for span in inner.spans}
        whole = tuple(span for span in group.spans if (span.axis, span.start) not in within)
        if group.fixed or (inside and not whole):
            return inside
        return (*inside, Inner(name, name, group.size, 1, whole))

    def tables(self, name: str, order: Tensor, inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The order of a group's units, and of what they consist of, as tables of a ``Matching``."""
        tables = {inner: own for inner, own in inside.items() if inner in self.inner}
        return tables if self.groups[name].fixed else {name: order, **tables}


def span_index(order: Tensor, span: Span) -> Tensor:
    """Entries of an axis in the order that ``order`` (d units) asks for: int64 (d * block,)."""
    begin = span.start + order * span.block
    if span.entries:
        begin = torch.tensor(span.entries, device=order.device)[order]
    return (begin[:, None] + torch.arange(span.block, device=order.device)).reshape(-1)


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
        whole[span_index(torch.arange(len(order), device=tensor.device), span)] = index
        state[span.axis.parameter] = tensor.index_select(span.axis.dim, whole)


def reorder_inside(weight: Tensor, order: Tensor) -> Tensor:
    """weight: (parts * rows, size, ...); order: (parts, size). Each part's rows read their units in its order."""
    parts, size = order.shape
    apart = weight.reshape(parts, -1, size, *weight.shape[2:])
    rows = torch.arange(parts, device=weight.device)[:, None]
    return apart.movedim(2, 1)[rows, order.to(weight.device)].movedim(1, 2).reshape(weight.shape)
