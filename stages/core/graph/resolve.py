"""Units and their relations -> the groups of a network, and the layouts of its values.

Tied units are one *class*. Classes that lie at the same places, as often at each, can change places with each other:
they are a group. Classes that are inside others are ordered inside them (``Inner``), and what holds them is the unit of
the group. What may be separate follows: docs/networks.md.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.core.graph.axes import HELD_NAME, NONE, SeveralDimensionsError, Units, Value
from stages.core.graph.classes import colours_of, tied
from stages.core.graph.layouts import Layout, Segment
from stages.core.runtime.errors import InputError
from stages.core.units.groups import Axis, Inner, PermutationGroup, PermutationSpec, Span


@dataclass(frozen=True)
class _Classes:
    """of: class of each unit. outer: class that a class is inside, or -1. group, unit: of each outermost class."""

    of: np.ndarray
    outer: np.ndarray
    group: np.ndarray
    unit: np.ndarray
    names: tuple[str, ...]

    def top(self, labels: np.ndarray) -> np.ndarray:
        """The outermost class of each label, -1 where it has no unit."""
        own = np.where(labels == NONE, -1, self.of[labels])
        outer = np.where(own < 0, -1, self.outer[own])
        return np.where(outer >= 0, outer, own)


class Resolved:
    """The groups of a network: ``spec``, and ``layout`` of any value."""

    def __init__(self, units: Units) -> None:
        self.units = units
        of, outer = tied(units)
        places = {where: _numbers(labels, of) for where, labels in units.places.items()}
        fixed = np.zeros(len(outer), dtype=bool)
        for own in units.fixed:
            fixed[of[own[own != NONE].numpy()]] = True
        fixed[outer[fixed & (outer >= 0)]] = True  # a part moves what is inside it
        whole = np.zeros(
            len(outer), dtype=bool
        )  # what lies across other units has an order inside, never others
        whole[[of[int(own)] for own in units.across]] = True
        fixed |= np.where(outer >= 0, fixed[outer], False)
        fixed |= whole
        self.across = whole
        self.common = of[torch.cat(units.common).numpy()] if units.common else np.zeros(0, dtype=int)
        colours, self.kinds = colours_of(units, of, outer, places, fixed)
        self.classes, self.spec = self._groups(of, outer, places, fixed, colours)

    def layout(self, node: str, value: Value) -> Layout:
        """Where the units of a value lie. Raises InputError where they lie on several dimensions."""
        top = self.classes.top(value.labels.numpy())
        varying = [d for d in value.dims if top.shape[d] > 1 and (top != top.take([0], d)).any()]
        free = {n for n, g in self.spec.groups.items() if not g.fixed}
        names = {self.classes.names[g] for g in np.unique(self.classes.group[top[top >= 0]])}
        if not names & free:  # images, logits: alike in every network
            dim = varying[-1] if varying else (value.dims[0] if value.dims else len(value.shape) - 1)
            dim = 1 if len(value.shape) > 3 and varying == list(range(1, len(value.shape))) else dim
            only = names.pop() if len(names) == 1 else ""
            known = only in self.spec.groups and self.spec.groups[only].size == value.shape[dim]
            return Layout(dim, (Segment(only if known else "", value.shape[dim]),))
        if len(varying) > 1:
            raise SeveralDimensionsError(
                f"{node}: units of {', '.join(sorted(names))} lie on dimensions {varying}; allowed: on one dimension, "
                "or in parts (heads, groups)"
            )
        if not value.dims:
            raise InputError(f"{node}: takes one of several units for itself; allowed: units side by side")
        dim = varying[0] if varying else self._only_dim(value, top)
        size = value.shape[dim]
        line, own = (
            np.resize(np.moveaxis(found, dim, 0).reshape(top.shape[dim], -1)[:, 0], size)
            for found in (top, self.classes.of[value.labels.numpy()])
        )
        return Layout(dim, self._segments(line, own))

    def _only_dim(self, value: Value, top: np.ndarray) -> int:
        """Of the dimensions that may hold a single unit, the one that does: that of nothing else, that of heads which
        have their keys in common, or the last."""
        single = [d for d in value.dims if value.labels.shape[d] == 1]
        heads = np.isin(top, self.common).any()
        return single[0] if single else value.dims[0] if heads else value.dims[-1]

    def _segments(self, line: np.ndarray, own: np.ndarray) -> tuple[Segment, ...]:
        """Runs of a dimension whose units follow each other."""
        none = line < 0
        group = np.where(none, -1, self.classes.group[line])
        unit = np.where(none, 0, self.classes.unit[line])
        changes = np.flatnonzero((np.diff(line) != 0) | none[1:]) + 1
        starts = np.concatenate([[0], changes])
        stops = np.concatenate([changes, [len(line)]])
        segments: list[Segment] = []
        # what a unit holds is cut (queries, keys) where there is one unit alone; of several each lies as a whole, or
        # as often in runs of one length (queries of all heads, then keys), in which rotary positions tie halves
        counts = np.unique(line[~none])
        runs = (stops - starts)[~none[starts]]
        cut = len(counts) == 1 or (len(runs) != len(counts) and len(np.unique(runs)) > 1)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            name = "" if group[start] < 0 else self.classes.names[group[start]]
            for block in _repeats(own[start:stop], self.kinds) if cut else [stop - start]:
                last = segments[-1] if segments else None
                follows = (
                    last is not None
                    and last.group == name
                    and (not name or last.first + last.size == unit[start])
                )
                if follows and last.block == block:
                    segments[-1] = Segment(name, last.size + 1, block, last.first)
                else:
                    segments.append(Segment(name, 1, block, 0 if not name else int(unit[start])))
        return tuple(segments)

    # -- groups -------------------------------------------------------------------------------------------------

    def _groups(
        self,
        of: np.ndarray,
        outer: np.ndarray,
        places: Mapping[tuple[str, int], np.ndarray],
        fixed: np.ndarray,
        colours: np.ndarray,
    ) -> tuple[_Classes, PermutationSpec]:
        first = np.full(len(outer), self.units.count)
        np.minimum.at(first, of, np.arange(self.units.count))
        tops = np.flatnonzero(outer < 0)
        tops = tops[np.argsort(first[tops], kind="stable")]
        group, unit = np.full(len(outer), -1), np.full(len(outer), -1)
        numbers: dict[int, int] = {}
        sizes: list[int] = []
        leaders: list[int] = []
        for cls in tops.tolist():
            g = numbers.setdefault(int(colours[cls]), len(sizes))
            if g == len(sizes):
                sizes.append(0)
                leaders.append(cls)
            group[cls], unit[cls] = g, sizes[g]
            sizes[g] += 1
        taken: set[str] = set()
        names = tuple(self._name(int(first[cls]), taken) for cls in leaders)
        classes = _Classes(of, outer, group, unit, names)
        children: dict[int, list[int]] = {}
        below = np.flatnonzero(outer >= 0)
        for cls in below[np.argsort(first[below], kind="stable")].tolist():
            children.setdefault(int(outer[cls]), []).append(cls)
        spans: dict[str, list[Span]] = {name: [] for name in names}
        positions = _positions(places)
        inner: dict[str, Inner] = {}
        for g in range(len(leaders)):
            members = tops[group[tops] == g].tolist()
            spans[names[g]] += _spans(positions, [[cls] for cls in members])
            kinds: dict[int, list[list[int]]] = {}
            for cls in members:
                for child in children.get(cls, ()):
                    kinds.setdefault(int(colours[child]), [[] for _ in members])[unit[cls]].append(child)
            for rows in self._lone_together(kinds.values()):
                size = len(rows[0])
                own = _spans(positions, [[child] for row in rows for child in row])
                spans[names[g]] += [whole for span in own for whole in _of_parts(span, size)]
                reads = self._kernels(of, rows)
                ordered = len({int(colours[child]) for child in rows[0]}) == 1
                if size > 1 and ordered and not fixed[rows[0][0]] and reads is not None:
                    name = self._name(int(first[rows[0][0]]), taken)
                    inner[name] = Inner(name, names[g], len(rows), size, tuple(own), tuple(reads))
        holding = {own.outer for own in inner.values()}
        groups = {
            name: PermutationGroup(name, sizes[g], tuple(spans[name]), bool(fixed[leaders[g]]))
            for g, name in enumerate(names)
            if (name in holding or not self.across[leaders[g]])
            and (spans[name] or not name.rstrip("'").endswith(HELD_NAME))  # of held values alone
        }
        return classes, PermutationSpec(groups, inner)

    def _lone_together(self, kinds: Iterable[list[list[int]]]) -> Iterator[list[list[int]]]:
        """What is inside parts, kind by kind, (parts, size) each; what has a pinned order, one of each kind, as one."""
        lone: dict[int, list[list[int]]] = {}
        for rows in kinds:
            if len(rows[0]) > 1:
                yield rows
                continue
            for row, own in zip(
                lone.setdefault(int(self.kinds[rows[0][0]]), [[] for _ in rows]), rows, strict=True
            ):
                row += own
        yield from lone.values()

    def _kernels(self, of: np.ndarray, rows: list[list[int]]) -> list[str] | None:
        """Kernels of grouped convolutions that read these units, part by part; None where one reads others too."""
        reads = []
        for parameter, units in self.units.kernels.items():
            own = np.isin(of[units.numpy()], rows)
            if own.any():
                if not own.all() or len(units) != len(rows):
                    return None
                reads.append(parameter)
        return reads

    def _name(self, unit: int, taken: set[str]) -> str:
        name = next(n for n, start, size in reversed(self.units.origins) if start <= unit < start + size)
        for own, hint in self.units.hints:
            if bool((own == unit).any()):
                name += hint
                break
        while name in taken:
            name += "'"
        taken.add(name)
        return name


def _repeats(own: np.ndarray, kinds: np.ndarray) -> list[int]:
    """Lengths of the runs of one unit's entries, cut where what is inside comes again or is of another kind."""
    if len(own) < 2 or (own == own[0]).all():
        return [len(own)]
    again = np.flatnonzero(own[1:] == own[0]) + 1
    again = [int(i) for i in again if own[i - 1] != own[0]]
    other = np.flatnonzero(np.diff(kinds[own])) + 1
    edges = [0, *sorted({*again, *other.tolist()}), len(own)]
    return [b - a for a, b in itertools.pairwise(edges)]


def _numbers(labels: Tensor, of: np.ndarray) -> np.ndarray:
    own = labels.numpy()
    return np.where(own == NONE, -1, of[own])


Positions = Mapping[tuple[str, int], Mapping[int, np.ndarray]]


def _positions(places: Mapping[tuple[str, int], np.ndarray]) -> dict[tuple[str, int], dict[int, np.ndarray]]:
    """For each place the entries of each class."""
    found = {}
    for where, own in places.items():
        order = np.argsort(own, kind="stable")
        classes, starts = np.unique(own[order], return_index=True)
        found[where] = dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))
        found[where].pop(-1, None)
    return found


def _spans(positions: Positions, units: list[list[int]]) -> list[Span]:
    """Where units, one class each, lie: runs of entries, regular ones told by their start."""
    spans = []
    for (parameter, dim), at in positions.items():
        if units[0][0] not in at:
            continue
        entries = np.stack([at[cls] for (cls,) in units])  # (units, entries of each)
        start = 0
        while start < entries.shape[1]:
            stop = start + 1
            while stop < entries.shape[1] and (entries[:, stop] == entries[:, stop - 1] + 1).all():
                if len(entries) > 1 and (entries[1:, start] == entries[:-1, start] + stop - start).all():
                    break
                stop += 1
            begin, block = entries[:, start], stop - start
            regular = (begin == begin[0] + block * np.arange(len(begin))).all()
            irregular = () if regular else tuple(begin.tolist())
            spans.append(Span(Axis(parameter, dim), int(begin[0]), block, irregular))
            start = stop
    return spans


def _of_parts(span: Span, size: int) -> list[Span]:
    """Spans of parts of ``size`` units each from that of the units inside them."""
    if not span.entries:
        return [Span(span.axis, span.start, span.block * size)]
    begin = np.array(span.entries).reshape(-1, size)
    if (begin == begin[:, :1] + span.block * np.arange(size)).all():
        return [Span(span.axis, span.start, span.block * size, tuple(begin[:, 0].tolist()))]
    return [Span(span.axis, int(own[0]), span.block, tuple(own.tolist())) for own in begin.T]
