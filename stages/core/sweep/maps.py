"""Sums over the rows of a convolution and its targets, from their maps (stages.core.sweep.shifted)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.sweep.rows import explicit_padding, input_rows
from stages.core.sweep.shifted import Plan, plan, weight_gradient

MAP_ENTRIES = 2**22  # of the maps that are worked with at a time, unless a single image has more
SEEN = 2**20  # entries of the rows of one image that are worked with at a time
LINES = 2**8  # of them, at most: their products are summed in the maps' own type


@dataclass(frozen=True)
class RowSums:
    """Sums over rows z (d_in) and y (d_out), weighted, float64; about their means where there is an intercept.

    weight: the sum of the rows' weights. G: (d_in, d_in). C: (d_in, d_out). yy: (d_out,). means: of z and of y; None
    without an intercept. What tells of targets is None where there are none.
    """

    weight: float
    G: Tensor
    C: Tensor | None
    yy: Tensor | None
    means: tuple[Tensor, Tensor] | None


class MapSums:
    """Maps z (n, c, h, w) and, where they are given, y (n, d_out, ...), as they come; entries of rows tap by tap.

    Products are taken in the type of the maps, some images at a time, the sums of these in float64. With an intercept
    a channel's first mean is taken from it, so that the products lose no digits to a common offset.
    """

    def __init__(self, node: Node, kernel: Sequence[int], size: Sequence[int], intercept: bool) -> None:
        """size: (h, w) of the inputs."""
        self.node, self.kernel, self.size, self.intercept = node, tuple(kernel), tuple(size), intercept
        self.plan = plan(node, kernel, size)
        self.weight, self.images = 0.0, 0.0
        self.products: list[Tensor] = []
        self.shift_z = self.shift_y = None
        self.C = self.yy = self.sum_y = None

    @staticmethod
    def bytes(plan: Plan, c: int, d_out: int) -> int:
        """Memory of the sums. d_out: 0 where there are no targets."""
        held = plan.sums * c * c + c * plan.lines[0].size * plan.lines[1].size
        return 8 * (held + d_out * (plan.taps * c + plan.places))

    @staticmethod
    def add_bytes(plan: Plan, c: int, d_out: int, images: int, itemsize: int) -> int:
        """Memory of adding so many images to them: maps, and a product with what it becomes in float64."""
        images = min(images, images_at_once(plan, c, d_out))
        own = c * plan.lines[0].size * plan.lines[1].size
        maps = (2 if len(plan.phases) == 1 else 3) * own + d_out * plan.places
        most = max(plan.taps * c * d_out, *(own.count * c * c for own in plan.correlations))
        return itemsize * images * maps + (2 * itemsize + 8) * most

    @staticmethod
    def finished_bytes(plan: Plan, c: int, d_out: int) -> int:
        """Memory of the finished sums."""
        return 8 * plan.taps * c * (plan.taps * c + d_out)

    @staticmethod
    def finish_bytes(plan: Plan, c: int, d_out: int) -> int:
        """What finishing them takes beside both."""
        d_in, seen = plan.taps * c, plan.taps * plan.places
        return 8 * (d_in * (7 * plan.taps + d_out) + 2 * min(max(SEEN, seen), c * seen))

    def add(self, z: Tensor, y: Tensor | None = None, weight: float = 1.0) -> None:
        """Some images, all of one weight."""
        step = images_at_once(self.plan, z.shape[1], 0 if y is None else y.shape[1])
        for i in range(0, len(z), step):
            self._add(z[i : i + step], None if y is None else y[i : i + step], weight)

    def _add(self, z: Tensor, y: Tensor | None, weight: float) -> None:
        if self.shift_z is None:
            self._begin(z, y)
        z = _without(z, self.shift_z)
        self.images += weight * len(z)
        self.weight += weight * len(z) * self.plan.places
        self.sum_z += weight * _over_images(z)
        maps = {phase: self._phase(z, phase) for phase in self.plan.phases}
        for own, total in zip(self.plan.correlations, self.products, strict=True):
            total.add_(own.of(maps[own.left], maps[own.right]).double(), alpha=weight)
        del maps
        if y is not None:
            y = _without(y, self.shift_y)
            self.sum_y += weight * _over_images(y)
            self.yy += weight * y.square().sum((0, 2, 3)).double()
            self.C.add_(self._cross(z, y).double(), alpha=weight)

    def _begin(self, z: Tensor, y: Tensor | None) -> None:
        on, options = float(self.intercept), {"dtype": torch.float64, "device": z.device}
        c = z.shape[1]
        self.shift_z = z.mean((0, 2, 3)) * on
        self.sum_z = torch.zeros(*z.shape[2:], c, **options)
        self.eps = torch.finfo(z.dtype).eps
        for own in self.plan.correlations:
            extents = (stop - start for start, stop in own.shifts)
            self.products.append(_channels_last(torch.zeros(c, c, *extents, **options)))
        if y is not None:
            self.shift_y = y.mean((0, 2, 3)) * on
            self.sum_y = torch.zeros(*y.shape[2:], y.shape[1], **options)
            self.yy = torch.zeros(y.shape[1], **options)
            self.C = _channels_last(torch.zeros(y.shape[1], c, *self.kernel, **options))

    def _phase(self, z: Tensor, phase: tuple[int, int]) -> Tensor:
        down, on = (own.stride for own in self.plan.lines)
        if (down, on) == (1, 1):
            return z
        return _channels_last(z[:, :, phase[0] :: down, phase[1] :: on])

    def _cross(self, z: Tensor, y: Tensor) -> Tensor:
        """(d_out, c, kh, kw)."""
        a, around = self.node.attributes, explicit_padding(self.node, self.kernel)
        padding = around[2], around[0]
        if around[::2] != around[1::2]:
            z, padding = F.pad(z, around), (0, 0)
        size = (y.shape[1], z.shape[1], *self.kernel)
        return weight_gradient(z, size, y, stride=a["stride"], padding=padding, dilation=a["dilation"])

    # -- from maps to rows --------------------------------------------------------------------------------------

    def finish(self) -> RowSums:
        """What the rows of all images give; nothing can be added after it."""
        seen = input_rows(self.node, self.sum_z.new_ones(1, 1, *self.size), self.kernel).T  # (taps, places)
        across, sum_z = self._seen_sums(seen)
        offset = torch.kron(torch.eye(len(seen)).to(seen), self.shift_z.double()[:, None])  # (d_in, taps)
        sum_z += offset @ seen.sum(1) * self.images
        # with z = z' + offset seen: what the products of z' are short of, and the product of the means
        across += (0.5 * self.images) * (seen @ seen.T) @ offset.T
        left, right = [offset, across.T], [across, offset.T]
        if self.intercept:
            left.append(sum_z[:, None] / -self.weight)
            right.append(sum_z[None])
        G = self._gram().addmm_(torch.cat(left, 1), torch.cat(right))
        if self.C is None:
            return RowSums(self.weight, G, None, None, None)
        return RowSums(self.weight, G, *self._targets(seen, offset, sum_z))

    def _seen_sums(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of z' summed over images: products with ``seen`` (taps, d_in), and the sum over places (d_in,)."""
        rows_of, taps = torch.cat([seen, seen.new_ones(1, seen.shape[1])]), len(seen)
        found = [
            (rows_of @ input_rows(self.node, own[None], self.kernel)).view(taps + 1, -1, taps)
            for own in self.sum_z.permute(2, 0, 1).split(max(1, SEEN // seen.numel()))
        ]
        sums = torch.cat(found, 1).transpose(1, 2).reshape(taps + 1, -1)
        return sums[:taps], sums[taps]

    def _targets(
        self, seen: Tensor, offset: Tensor, sum_z: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """C, yy and the means."""
        by_place = self.sum_y.flatten(0, 1)  # (places, d_out)
        C = self.C.permute(2, 3, 1, 0).flatten(0, 2).addmm_(offset, seen @ by_place)
        if not self.intercept:
            return C, self.yy, None
        mean_y = by_place.sum(0) / self.weight
        C -= torch.outer(sum_z, mean_y)
        yy = self.yy - self.weight * mean_y.square()
        return C, yy, (sum_z / self.weight, mean_y + self.shift_y.double())

    def _gram(self) -> Tensor:
        """Of z', (d_in, d_in). The products are gone after it."""
        taps, c = self.plan.taps, len(self.shift_z)
        G = self.sum_z.new_zeros(taps, c, taps, c)
        for (i, j), terms in self.plan.blocks.items():
            for sign, index, (down, on) in terms:
                G[i, :, j].add_(self.products[index][:, :, down, on], alpha=sign)
            if i != j:
                G[j, :, i] = G[i, :, j].T
        self.products.clear()
        return G.view(taps * c, taps * c)


def map_entries(columns: Tensor, taps: int, c: int) -> Tensor:
    """Where ``RowSums`` has entries of rows (stages.core.sweep.rows): there channel by channel, here tap by tap."""
    return columns % taps * c + columns // taps


def worthwhile(plan: Plan, c: int) -> bool:
    """Whether maps are faster than rows, as measured on one thread of a CPU.

    They are where they take less than half of the products: kernels whose taps overlap. Rows of a few entries, as
    those of a 3x3 kernel that reads images, take no time.
    """
    return plan.taps * c >= 64 and 2 * plan.products < plan.places * plan.taps**2


def images_at_once(plan: Plan, c: int, d_out: int) -> int:
    """How many images' products are taken at a time."""
    entries = max(c * plan.lines[0].size * plan.lines[1].size, d_out * plan.places)
    return max(1, min(MAP_ENTRIES // entries, LINES // plan.lines[0].size))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _without(x: Tensor, shift: Tensor) -> Tensor:
    """Maps less a number for each channel, channels last."""
    return _channels_last(x) - shift.view(-1, 1, 1)


def _over_images(x: Tensor) -> Tensor:
    """The sum over images, channels last: (h, w, c) float64."""
    flat = x.permute(0, 2, 3, 1).reshape(len(x), -1)
    return (flat.new_ones(len(x)) @ flat).double().view(*x.shape[2:], x.shape[1])
