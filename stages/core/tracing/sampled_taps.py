"""A deformable convolution as what it is made of: a sampled map for each tap of its kernel, and a convolution of these.

The offsets are coordinates, and so in an order that is fixed; channels may be in any, and be separate. ``bilinear`` is
a linear map of products, of every unit of one value with every one of the other.
"""

import torch
import torch.fx

from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import tensor_shape
from stages.core.tracing.rewriting import called, given_to

DEFORMABLE = ("deform_conv2d", "bilinear")


def taps_apart(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and opname(node) in DEFORMABLE:
            with graph.inserting_before(node):
                found = (_deformable if opname(node) == "deform_conv2d" else _bilinear)(graph, node)
            node.replace_all_uses_with(found)
    graph.eliminate_dead_code()


def _bilinear(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    given, aten = given_to(node), torch.ops.aten
    one = called(graph, node, aten.unsqueeze.default, given["input1"], -1)
    two = called(graph, node, aten.unsqueeze.default, given["input2"], -2)
    both = called(graph, node, aten.mul.Tensor, one, two)
    rows = called(graph, node, aten.reshape.default, both, [*tensor_shape(both)[:-2], -1])
    shape = tensor_shape(given["weight"])
    weight = called(graph, node, aten.reshape.default, given["weight"], [shape[0], shape[1] * shape[2]])
    return called(graph, node, aten.linear.default, rows, weight, given.get("bias"))


def _deformable(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    given, aten = given_to(node), torch.ops.aten
    channels, weight, out = (
        tensor_shape(given["input"])[1],
        tensor_shape(given["weight"]),
        tensor_shape(node)[2:],
    )
    parts, taps, groups = given["offset_groups"], weight[2] * weight[3], given["groups"]

    def cut(value: torch.fx.Node, dim: int, at: int, size: int) -> torch.fx.Node:
        return called(graph, node, aten.slice.Tensor, value, dim, at * size, (at + 1) * size)

    sampled = []
    for part in range(parts):
        image, maps = cut(given["input"], 1, part, channels // parts), []
        for tap in range(taps):
            at = part * taps + tap
            both = [cut(given["offset"], 1, 2 * at + side, 1) for side in (1, 0)]  # x before y
            places = [_places(graph, node, own, side, tap) for own, side in zip(both, (1, 0), strict=True)]
            grid = called(graph, node, aten.cat.default, places, 1)
            grid = called(graph, node, aten.permute.default, grid, [0, 2, 3, 1])
            found = called(graph, node, aten.grid_sampler.default, image, grid, 0, 0, False)
            if given["use_mask"]:
                found = called(graph, node, aten.mul.Tensor, found, cut(given["mask"], 1, at, 1))
            maps.append(found)
        sampled.append(called(graph, node, aten.stack.default, maps, 2))
    whole = sampled[0] if parts == 1 else called(graph, node, aten.cat.default, sampled, 1)
    whole = called(graph, node, aten.reshape.default, whole, [-1, channels * taps, *out])
    kernel = called(graph, node, aten.reshape.default, given["weight"], [weight[0], weight[1] * taps, 1, 1])
    made = []
    for group in range(groups):
        rows = cut(kernel, 0, group, weight[0] // groups) if groups > 1 else kernel
        bias = cut(given["bias"], 0, group, weight[0] // groups) if groups > 1 else given["bias"]
        seen = cut(whole, 1, group, channels * taps // groups) if groups > 1 else whole
        made.append(called(graph, node, aten.conv2d.default, seen, rows, bias))
    return made[0] if groups == 1 else called(graph, node, aten.cat.default, made, 1)


def _places(
    graph: torch.fx.Graph, node: torch.fx.Node, offset: torch.fx.Node, side: int, tap: int
) -> torch.fx.Node:
    """Where a tap looks, (images, 1, ...), between -1 and 1. side: 0 for rows, 1 for columns."""
    given, aten, letter = given_to(node), torch.ops.aten, "hw"[side]
    count, wide = tensor_shape(node)[2 + side], tensor_shape(given["weight"])[3]
    size, step = tensor_shape(given["input"])[2 + side], given[f"stride_{letter}"]
    start = given[f"dilation_{letter}"] * (tap % wide if side else tap // wide) - given[f"pad_{letter}"]
    line = called(graph, node, aten.arange.start_step, start, start + count * step, step)
    line = called(graph, node, aten.reshape.default, line, [1, 1, 1, count] if side else [1, 1, count, 1])
    places = called(graph, node, aten.add.Tensor, offset, line)
    places = called(graph, node, aten.mul.Scalar, places, 2.0 / size)
    return called(graph, node, aten.add.Scalar, places, 1.0 / size - 1.0)
