"""Where units lie on values while a network is traced, and which groups they belong to.

Some operations keep units in *parts*: the heads of an attention, the groups of a grouped convolution or of a group
norm. Whole parts may change places, and so may the units inside one part, but no unit leaves its part. The parts are
then the units of a group of their own, the *outer* one, which values are laid out by; the order inside the parts is
an ``Inner`` of the spec, which is permuted but never split.

What may be separate follows. Every group that is not fixed (images, logits) may be separate unit by unit at any budget
from 1 to N, and all of them are at budget N:

- MLP, VGG, ResNet, DenseNet: hidden units and channels; a residual stream is one group. Behind a flatten a unit is
  its whole map, so that VGG's 7x7 maps stay together.
- depthwise convolutions (MobileNet, ConvNeXt): they join the channels before and after, one group.
- grouped convolutions (ResNeXt): one conv-group with its inputs and outputs is a unit, 32 in a 32x4d block.
- group norm: one of its groups is a unit of the stream it normalises; one group alone is as a layer norm.
- layer norm: single units; each network's view is normalised by itself, a shared unit by the
  mean of the views' statistics, so that nothing and everything separate are both exact.
- attention (ViT): the stream with class token and position embedding, the MLPs' hidden units, and whole heads:
  queries, keys and values of a head stay together.
"""

from dataclasses import dataclass

from stages.core.runtime.errors import InputError
from stages.core.units.groups import Axis, Inner, PermutationGroup, PermutationSpec, Span


@dataclass(frozen=True)
class Segment:
    """``size`` units of a group side by side on a value's unit dimension, each ``block`` entries wide."""

    group: str
    size: int
    block: int = 1


@dataclass(frozen=True)
class Layout:
    """The dimension of a value that holds units, and the groups along it."""

    dim: int
    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        return sum(segment.size * segment.block for segment in self.segments)


class Groups:
    """The groups of a network while it is being traced: spans are recorded, then groups are tied (union-find)."""

    def __init__(self) -> None:
        self.parents: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.spans: dict[str, list[Span]] = {}
        self.inside: dict[
            str, list[str]
        ] = {}  # weights whose dimension 1 counts the units of a row's own part
        self.outer: dict[str, str] = {}  # a group whose units stay in parts -> the group of its parts

    def new(self, size: int, name: str) -> str:
        while name in self.parents:
            name += "'"
        self.parents[name] = name
        self.sizes[name] = size
        self.spans[name] = []
        self.inside[name] = []
        return name

    def find(self, group: str) -> str:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def place(self, parameter: str, dim: int, layout: Layout) -> None:
        """Record that a parameter's dimension follows a layout."""
        start = 0
        for segment in layout.segments:
            self.spans[segment.group].append(Span(Axis(parameter, dim), start, segment.block))
            start += segment.size * segment.block

    def tie(self, node: str, first: Layout, second: Layout) -> None:
        """Two layouts that must be permuted together."""
        if first.dim != second.dim or [(s.size, s.block) for s in first.segments] != [
            (s.size, s.block) for s in second.segments
        ]:
            raise InputError(f"{node}: joins values whose units do not lie alike; allowed: equal layouts")
        for a, b in zip(first.segments, second.segments, strict=True):
            self._unite(node, a.group, b.group)

    def keep_parts(self, node: str, group: str, outer: str) -> None:
        """The units of ``group`` stay in parts, which are the units of ``outer``."""
        group = self.find(group)
        if self.sizes[group] == self.sizes[self.find(outer)]:
            self._unite(node, group, outer)  # parts of one unit
        elif group in self.outer:
            self._unite(node, self.outer[group], outer)
        else:
            self.outer[group] = outer

    def _unite(self, node: str, a: str, b: str) -> None:
        order = list(self.parents)  # the group that was there first gives its name
        first, second = sorted((self.find(a), self.find(b)), key=order.index)
        if first == second:
            return
        if self.sizes[first] != self.sizes[second]:
            raise InputError(
                f"{node}: keeps the units of group {first} in {self.sizes[second]} parts, another operation in "
                f"{self.sizes[first]}; allowed: one number of parts (heads, groups) per residual stream"
            )
        self.parents[second] = first
        if second in self.outer:
            outer = self.outer.pop(second)
            if first in self.outer:
                self._unite(node, self.outer[first], outer)
            else:
                self.outer[first] = outer

    # -- the result ---------------------------------------------------------------------------------------------

    def resolve(self, layout: Layout) -> Layout:
        """A layout in terms of the groups of the spec."""
        return Layout(layout.dim, tuple(self._segment(s.group, s.size, s.block) for s in layout.segments))

    def _segment(self, group: str, size: int, block: int) -> Segment:
        group = self.find(group)
        if group not in self.outer:
            return Segment(group, size, block)
        outer = self.find(self.outer[group])
        if outer in self.outer:
            raise InputError(
                f"group {group}: its units lie in {self.sizes[outer]} parts, which lie in parts themselves; "
                "allowed: one number of parts (heads, groups) per residual stream"
            )
        return Segment(outer, self.sizes[outer], size // self.sizes[outer] * block)

    def spec(self, *ends: Layout) -> PermutationSpec:
        """The groups, those on the layouts ``ends`` fixed."""
        roots = [name for name in self.parents if self.find(name) == name]
        raw: dict[str, list[Span]] = {name: [] for name in roots}
        inside: dict[str, list[str]] = {name: [] for name in roots}
        for name, own in self.spans.items():
            raw[self.find(name)] += own
            inside[self.find(name)] += self.inside[name]
        fixed_inside = {self.find(s.group) for end in ends for s in end.segments}
        fixed = {s.group for end in ends for s in self.resolve(end).segments}
        spans: dict[str, list[Span]] = {name: [] for name in roots if name not in self.outer}
        inner = {}
        for name in roots:
            unit = self._segment(name, self.sizes[name], 1)
            spans[unit.group] += [Span(s.axis, s.start, s.block * unit.block) for s in raw[name]]
            if name in self.outer and name not in fixed_inside:
                inner[name] = Inner(
                    name, unit.group, unit.size, unit.block, tuple(raw[name]), tuple(inside[name])
                )
        return PermutationSpec(
            {n: PermutationGroup(n, self.sizes[n], tuple(own), n in fixed) for n, own in spans.items()}, inner
        )
