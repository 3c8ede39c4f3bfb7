"""Sums over the rows of a convolution without its rows: Gram and cross matrices from shifted maps.

Row o of a convolution's input (stages.core.sweep.rows) has at entry (channel, tap t) the map's value at
``stride * o + a_t``, a_t = dilation * t - padding, and zero outside of the map. With the map taken apart by phase,
X_r[v] = x[stride * v + r], that value is X_r[o + q] with a_t = stride * q + r, so that

    G[t, t'] = sum_o X_r[o + q] X_r'[o + q']^T = sum_v X_r[v] X_r'[v + q' - q]^T,    v from q to q + places,

is a product of two maps that depends on the difference of the taps alone, but for which v count. All v of the map are
taken for every difference at once, which is the weight gradient of a convolution of one map with the other; strips at
the border are taken off again. For 3x3 of stride 1 that is 13 products (channels, channels) in place of 45 (as 3 x 5
differences, 15). The cross matrix with the targets is the weight gradient of the convolution itself.

A common offset of a channel would cost the products digits, and is not subtracted from the rows, where padding has
none: it is taken from the map, and put back into the sums by what each tap sees of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from stages.core.graph.nodes import Node
from stages.core.sweep.rows import explicit_padding

Stretch = tuple[int, int]  # from, to (exclusive)


@dataclass(frozen=True)
class MapAxis:
    """One axis of a convolution. ``taps``: (phase, q) of each tap."""

    size: int
    places: int
    stride: int
    taps: tuple[Stretch, ...]

    def length(self, phase: int) -> int:
        """Of the map of a phase."""
        return len(range(phase, self.size, self.stride))

    def left_out(self, tap: int) -> list[Stretch]:
        """Stretches of a phase's map that do not count for one of its taps."""
        phase, q = self.taps[tap]
        length = self.length(phase)
        low, high = min(max(q, 0), length), min(max(q + self.places, 0), length)
        return [span for span in ((0, low), (high, length)) if span[0] < span[1]]

    def meet(self, span: Stretch, phase: int, shift: int) -> bool:
        """Whether a stretch, shifted, touches the map of a phase."""
        return span[0] + shift < self.length(phase) and span[1] + shift > 0


def line(size: int, kernel: int, stride: int, dilation: int, padding: Stretch) -> MapAxis:
    """padding: before and behind."""
    places = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    starts = [dilation * tap - padding[0] for tap in range(kernel)]
    return MapAxis(size, places, stride, tuple((start % stride, start // stride) for start in starts))


@dataclass(frozen=True)
class Correlation:
    """sum_v X_left[v] X_right[v + shift]^T for v in a box of X_left and all shifts of a box, (height, width) each."""

    left: Stretch
    right: Stretch
    box: tuple[Stretch, Stretch]
    shifts: tuple[Stretch, Stretch]

    @property
    def count(self) -> int:
        """How many shifts there are."""
        return _extent(self.shifts[0]) * _extent(self.shifts[1])

    @property
    def products(self) -> int:
        """Outer products of channels of one image."""
        return self.count * _extent(self.box[0]) * _extent(self.box[1])

    def of(self, left: Tensor, right: Tensor) -> Tensor:
        """The maps of some images, (n, c, h, w) each, to (c, c, shifts, shifts)."""
        (top, bottom), (start, stop) = self.box
        (up, down), (back, on) = self.shifts
        edges = (-start - back, stop + on - 1 - right.shape[3], -top - up, bottom + down - 1 - right.shape[2])
        seen = F.pad(right, edges) if any(edges) else right
        size = (left.shape[1], right.shape[1], down - up, on - back)
        return weight_gradient(seen, size, left[:, :, top:bottom, start:stop])


@dataclass(frozen=True)
class Plan:
    """How the Gram matrix of a convolution's rows is put together.

    blocks: {(tap, tap'): ((sign, correlation, shift), ...)}, shift being a place among the correlation's; the blocks
    that are missing are transposes of those of (tap', tap). Taps are counted row by row.
    """

    lines: tuple[MapAxis, MapAxis]
    correlations: tuple[Correlation, ...]
    blocks: dict[tuple[int, int], tuple[tuple[int, int, tuple[int, int]], ...]]

    @property
    def taps(self) -> int:
        return len(self.lines[0].taps) * len(self.lines[1].taps)

    @property
    def places(self) -> int:
        return self.lines[0].places * self.lines[1].places

    @property
    def products(self) -> int:
        """Outer products of channels of one image, to compare with places * taps^2 of the rows."""
        return sum(own.products for own in self.correlations)

    @property
    def sums(self) -> int:
        """Products (channels, channels) that are held."""
        return sum(own.count for own in self.correlations)

    @property
    def phases(self) -> list[Stretch]:
        """Of the maps that are looked at."""
        return sorted({phase for own in self.correlations for phase in (own.left, own.right)})


def plan(node: Node, kernel: Sequence[int], size: Sequence[int]) -> Plan:
    """Of a Conv2d whose kernel and maps have the given height and width."""
    left, right, top, bottom = explicit_padding(node, kernel)
    edges, a = ((top, bottom), (left, right)), node.attributes
    return _plan(*(line(size[i], kernel[i], a["stride"][i], a["dilation"][i], edges[i]) for i in (0, 1)))


@cache
def _plan(*lines: MapAxis) -> Plan:
    wanted: dict[tuple, list[tuple]] = {}  # (phase, phase', box) -> (sign, tap, tap', shift)
    taps = list(product(*(range(len(own.taps)) for own in lines)))
    for (i, t), (j, u) in product(enumerate(taps), repeat=2):
        phase, q = _tap(lines, t)
        other, p = _tap(lines, u)
        shift = (p[0] - q[0], p[1] - q[1])
        if (phase, (0, 0)) <= (other, shift):  # else it is a transpose
            for sign, box in _boxes(lines, phase, t):
                if all(lines[k].meet(box[k], other[k], shift[k]) for k in (0, 1)):
                    wanted.setdefault((phase, other, box), []).append((sign, i, j, shift))
    return _planned(lines, wanted, len(taps))


def _planned(lines: tuple[MapAxis, MapAxis], wanted: dict[tuple, list[tuple]], taps: int) -> Plan:
    correlations, blocks = [], {}
    for index, ((left, right, box), terms) in enumerate(wanted.items()):
        shifts = [term[3] for term in terms]
        spans = tuple((min(s[k] for s in shifts), max(s[k] for s in shifts) + 1) for k in (0, 1))
        correlations.append(Correlation(left, right, box, spans))
        for sign, i, j, (down, on) in terms:
            blocks.setdefault((i, j), []).append((sign, index, (down - spans[0][0], on - spans[1][0])))
    return Plan(lines, tuple(correlations), {pair: tuple(terms) for pair, terms in blocks.items()})


def _tap(lines: tuple[MapAxis, MapAxis], tap: Stretch) -> tuple[Stretch, Stretch]:
    """Phase and q of a tap, (height, width) each."""
    down, on = (own.taps[t] for own, t in zip(lines, tap, strict=True))
    return (down[0], on[0]), (down[1], on[1])


def _boxes(
    lines: tuple[MapAxis, MapAxis], phase: Stretch, tap: Stretch
) -> Iterator[tuple[int, tuple[Stretch, Stretch]]]:
    """What is taken (1) and taken off again (-1): all of the map, strips at its border, what two strips share."""
    down, on = (
        [(1, (0, own.length(phase[k]))), *((-1, span) for span in own.left_out(tap[k]))]
        for k, own in enumerate(lines)
    )
    for (sign, rows), (other, columns) in product(down, on):
        yield sign * other, (rows, columns)


def _extent(span: Stretch) -> int:
    return span[1] - span[0]


def weight_gradient(x: Tensor, size: Sequence[int], y: Tensor, **convolution: Sequence[int]) -> Tensor:
    """sum over images and places of y (n, d_out, ...) times what a kernel of ``size`` reads there of x: that size.

    In the type of x, and no shorter: on GPUs convolutions would else be taken in TF32.
    """
    own = _exact() if x.is_cuda else nullcontext()
    with own:
        return conv2d_weight(x, size, y, **convolution)


def _exact() -> AbstractContextManager[None]:
    """cuDNN without TF32, by the same kernel each time."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
