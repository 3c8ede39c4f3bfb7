"""What units of one network give in the place of another's, kept up to date as the orders of other units change.

The gain of a pair of units is the inner product of their weights, the other axes in the reference's order (Git
Re-Basin, Ainsworth et al. 2023, section 3.2). With rows and columns in each network's own order it does not depend on
these units' order, but only on which of the other axes' entries belong together: where few of those have moved, their
share of the products is taken off and put back.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.core.units.groups import Inner, Span, State, span_index
from stages.core.units.matching import inside_order

Partners = dict[int, Tensor]  # axis of a tensor -> which entry of network m belongs to each of network n's


class Gains:
    """Of all pairs of networks. on: {parameter: the units on its axes}; states: float64."""

    def __init__(self, states: Sequence[State], on: Mapping[str, Sequence[tuple[Inner, Span]]]) -> None:
        self.states, self.on = states, on
        self._gains: dict[tuple[str, int, int], Tensor] = {}
        self._partners: dict[tuple[str, Span, int, int], Partners] = {}
        self._tables: dict[tuple[str, Span, int, int], list[tuple[Tensor, int]]] = {}

    def of(self, units: Mapping[str, Tensor], inner: Inner, spans: Sequence[Span], network: int) -> Tensor:
        """(d, d): of each unit of a network (columns) in the place of each of the reference (rows).

        spans: where the units' weights are linear in their order, the same at every call.
        """
        size = inner.parts * inner.size
        gain = torch.zeros(size, size, dtype=torch.float64)
        for n in range(len(self.states)):
            if n != network:
                gain += self._between(units, inner, spans, n, network)[inside_order(units, inner, n)]
        return gain

    def _between(
        self, units: Mapping[str, Tensor], inner: Inner, spans: Sequence[Span], n: int, m: int
    ) -> Tensor:
        """Both networks' units in their own order."""
        size = inner.parts * inner.size
        if (inner.name, n, m) not in self._gains:
            self._gains[inner.name, n, m] = torch.zeros(size, size, dtype=torch.float64)
        gain = self._gains[inner.name, n, m]
        for span in spans:
            key, tables = (inner.name, span, n, m), self._tables_beside(units, span)
            before, seen = self._partners.get(key), self._tables.get(key, ())
            if before is not None and all(
                a is b and v == w for (a, v), (b, w) in zip(seen, tables, strict=True)
            ):
                continue  # nothing has moved on the other axes
            self._tables[key] = tables
            now = self._belonging(units, span, n, m)
            self._partners[key] = now
            mine, theirs = self.states[m][span.axis.parameter], self.states[n][span.axis.parameter]
            if before is None:
                gain += _rows(theirs, span, size) @ _rows(_placed(mine, now), span, size).T
                continue
            moved = {dim: (own != before[dim]).nonzero().flatten() for dim, own in now.items()}
            moved = {dim: entries for dim, entries in moved.items() if len(entries)}
            if len(moved) > 1:
                change = _placed(mine, now) - _placed(mine, before)
                gain += _rows(theirs, span, size) @ _rows(change, span, size).T
            for dim, entries in moved.items() if len(moved) == 1 else ():
                same = _placed(mine, {d: own for d, own in now.items() if d != dim})
                change = same.index_select(dim, now[dim][entries])
                change -= same.index_select(dim, before[dim][entries])
                gain += _rows(theirs.index_select(dim, entries), span, size) @ _rows(change, span, size).T
        return gain

    def _tables_beside(self, units: Mapping[str, Tensor], span: Span) -> list[tuple[Tensor, int]]:
        """The orders of the units on the other axes, each with how often it was written."""
        beside = [inner for inner, own in self.on[span.axis.parameter] if own.axis.dim != span.axis.dim]
        names = [name for inner in beside for name in (inner.outer, inner.name) if name in units]
        return [(units[name], units[name]._version) for name in names]

    def _belonging(self, units: Mapping[str, Tensor], span: Span, n: int, m: int) -> Partners:
        """On each axis but the span's own that holds units."""
        shape, found = self.states[0][span.axis.parameter].shape, {}
        for dim in {own.axis.dim for _, own in self.on[span.axis.parameter]} - {span.axis.dim}:
            there, here = torch.arange(shape[dim]), torch.arange(shape[dim])
            for inner, own in self.on[span.axis.parameter]:
                if own.axis.dim == dim:
                    entries = span_index(torch.arange(inner.parts * inner.size), own)
                    there[entries] = span_index(inside_order(units, inner, n), own)
                    here[entries] = span_index(inside_order(units, inner, m), own)
            found[dim] = torch.empty_like(here)
            found[dim][there] = here
        return found


def _placed(tensor: Tensor, partners: Partners) -> Tensor:
    for dim, own in partners.items():
        tensor = tensor.index_select(dim, own)
    return tensor


def _rows(tensor: Tensor, span: Span, size: int) -> Tensor:
    """A tensor as one row per unit: (size, everything else)."""
    own = tensor.movedim(span.axis.dim, 0)
    if span.entries:  # not one behind the other
        return own[span_index(torch.arange(size), span)].reshape(size, -1)
    return own.narrow(0, span.start, size * span.block).reshape(size, -1)
