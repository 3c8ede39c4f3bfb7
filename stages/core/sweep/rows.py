"""Linear and convolutions seen as one thing: a matrix W that maps rows of d_in entries to rows of d_out entries.

- Linear: x (n, ..., c) -> rows (n * ..., c); W is the weight, (d_out, c).
- Conv2d: x (n, c, h, w) -> rows (n * positions, c * kh * kw), one per place the kernel is put (im2col);
  W is the weight (d_out, c, kh, kw) flattened from dimension 1. Entry ``channel * kh * kw + offset`` of a row
  belongs to ``channel``, so the columns that a channel owns are ``taps`` entries side by side.
- ConvTranspose2d: the same, one row per place of the output: what each tap reads there, zero where it reads nothing.
  W is the weight as (d_out, c, kh, kw).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph.nodes import Node


def input_rows(node: Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """x: one batch of the layer's input; kernel: (kh, kw), () for Linear. Returns (rows, d_in)."""
    if node.operation == "linear":
        return x.reshape(-1, x.shape[-1])
    if node.operation != "conv2d":
        return _unfolded(node, x, kernel)
    a = node.attributes
    padding = explicit_padding(node, kernel)
    if any(padding):
        x = F.pad(x, padding)
    if tuple(kernel) == (1, 1):
        x = x[:, :, :: a["stride"][0], :: a["stride"][1]]
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    patches = F.unfold(x, tuple(kernel), dilation=a["dilation"], stride=a["stride"])  # (n, d_in, positions)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _unfolded(node: Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """The same for convolutions of any kind, one dimension after the other."""
    spatial, size = len(kernel), x.shape[2:]
    x = F.pad(x, [0, 1] * spatial)  # behind each dimension what is read where there is nothing
    for i in range(spatial):
        at = _read_by(node, kernel, size[i], i).to(x.device)  # (places, k)
        x = x.index_select(2 + i, at.flatten()).unflatten(2 + i, at.shape).movedim(3 + i, -1)
    x = x.movedim(1, 1 + spatial)  # (n, *places, c, *kernel)
    return x.reshape(-1, x.shape[1 + spatial :].numel())


def _read_by(node: Node, kernel: Sequence[int], size: int, i: int) -> Tensor:
    """Which of ``size`` entries of spatial dimension i each tap reads, at each place: (places, k), ``size`` for none.

    A convolution reads stride * place - padding + dilation * tap. Its transpose reads the entry that this takes to the
    place: (place + padding - dilation * tap) / stride, where that is a whole number.
    """
    a, k = node.attributes, kernel[i]
    stride, dilation = a["stride"][i], a["dilation"][i]
    before, behind = _each_side(a["padding"], kernel, a["dilation"])[i]
    span, taps = dilation * (k - 1), torch.arange(k) * dilation
    if node.transposed:
        extra = a.get("output_padding", [0] * len(kernel))[i]
        places = (size - 1) * stride - before - behind + span + extra + 1
        at = torch.arange(places)[:, None] + before - taps
        whole, at = at % stride == 0, at // stride
    else:
        places = (size + before + behind - span - 1) // stride + 1
        at = torch.arange(places)[:, None] * stride - before + taps
        whole = torch.ones_like(at, dtype=torch.bool)
    return torch.where(whole & (at >= 0) & (at < size), at, size)


def output_rows(node: Node, y: Tensor) -> Tensor:
    """y: one batch of the layer's output. Returns (rows, d_out), in the order of ``input_rows``."""
    if node.operation == "linear":
        return y.reshape(-1, y.shape[-1])
    return y.movedim(1, -1).reshape(-1, y.shape[1])


def unit_rows(y: Tensor, dim: int, block: int = 1) -> Tensor:
    """Any value with its units on ``dim``, each ``block`` entries wide, as (rows, units)."""
    y = y.movedim(dim, -1)
    y = y.reshape(-1, y.shape[-1])
    if block > 1:
        y = y.reshape(len(y), -1, block).transpose(1, 2).reshape(-1, y.shape[1] // block)
    return y


def weight_matrix(weight: Tensor) -> Tensor:
    """A layer's weight as W, (d_out, d_in)."""
    return weight.flatten(1)


def kernel_of(weight: Tensor) -> tuple[int, ...]:
    """(kh, kw) of a convolution's weight, () of a Linear's."""
    return tuple(weight.shape[2:])


def tap_columns(channels: Tensor, taps: int) -> Tensor:
    """Columns of W that belong to the given input channels: int64 (len(channels) * taps,)."""
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).reshape(-1)


def _each_side(
    padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and behind, dimension by dimension."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(n // 2, n - n // 2) for n in total]
    return [(n, n) for n in padding]


def draw_places(images: int, places: int, share: float, generator: torch.Generator) -> Tensor:
    """A share of each image's places, at least one, as many of every image: int64 (images, drawn)."""
    count = max(1, round(share * places))
    return torch.rand(images, places, generator=generator).argsort(1)[:, :count]


def place_rows(drawn: Tensor, places: int) -> Tensor:
    """Which rows the drawn places of images are, (images, drawn) -> (images * drawn,)."""
    return (torch.arange(len(drawn))[:, None] * places + drawn).flatten()


def drawn_rows(node: Node, x: Tensor, kernel: Sequence[int], drawn: Tensor) -> Tensor:
    """``input_rows`` of a Conv2d at the drawn places alone, without those of the others."""
    a, (left, right, top, bottom) = node.attributes, explicit_padding(node, kernel)
    x = F.pad(x, (left, right, top, bottom)).permute(0, 2, 3, 1)  # (n, h, w, c)
    n, h, w, c = x.shape
    down, on = (torch.arange(k, device=x.device) * d for k, d in zip(kernel, a["dilation"], strict=True))
    taps = (down[:, None] * w + on).flatten()
    across = (w - int(on[-1]) - 1) // a["stride"][1] + 1  # places of a line
    drawn = drawn.to(x.device)
    first = drawn // across * a["stride"][0] * w + drawn % across * a["stride"][1]
    first = first + torch.arange(n, device=x.device)[:, None] * h * w
    rows = x.reshape(-1, c)[(first.flatten()[:, None] + taps).flatten()]
    return rows.view(-1, len(taps), c).transpose(1, 2).reshape(len(first.flatten()), -1)


def explicit_padding(node: Node, kernel: Sequence[int]) -> list[int]:
    """A Conv2d's padding as F.pad wants it: left, right, top, bottom."""
    padding, dilation = node.attributes["padding"], node.attributes["dilation"]
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":  # torch puts the odd one behind
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    return [padding[1], padding[1], padding[0], padding[0]]
