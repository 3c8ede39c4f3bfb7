"""The rules of the operations: where the units of a node's inputs are on its parameters and on its output.

rule(groups, node, layouts of the inputs, their shapes, shape of the output) -> layout of the output. Shapes are those
of one image, (1, ...). A rule that does not apply is an InputError that names the node.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stages.core.graph.layouts import Groups, Layout, Segment
from stages.core.graph.nodes import Node
from stages.core.runtime.errors import InputError

Shapes = Sequence[torch.Size]
Rule = Callable[[Groups, Node, Sequence[Layout], Shapes, torch.Size], Layout]


def same(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """Elementwise on one value."""
    return layouts[0]


def joined(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """Elementwise on several values: their units must be permuted together."""
    for other in layouts[1:]:
        groups.tie(node.name, layouts[0], other)
    return layouts[0]


# -- linear maps ----------------------------------------------------------------------------------------------------


def linear(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: torch.Size) -> Layout:
    """New units for the outputs, in ``packed`` groups side by side (query, key, value) or, by default, one."""
    dim = 1 if node.operation == "conv2d" else len(out) - 1
    _expect(node, layouts[0], dim)
    if node.grouped:
        return _grouped(groups, node, layouts[0], shapes[0], out)
    names = node.attributes.get("packed", [""])
    size = out[dim] // len(names)
    result = Layout(dim, tuple(Segment(groups.new(size, _layer(node) + name), size) for name in names))
    groups.place(node.parameters["weight"], 1, layouts[0])
    _place_rows(groups, node, result)
    return result


def _grouped(groups: Groups, node: Node, layout: Layout, shape: torch.Size, out: torch.Size) -> Layout:
    """Output channels stay with the input channels they read: as one unit, or in a part each."""
    parts = node.attributes["groups"]
    if parts == shape[1] == out[1]:  # depthwise: acts on every channel alone, as a batch norm does
        _place_rows(groups, node, layout)
        return layout
    if len(layout.segments) > 1 or layout.segments[0].block > 1:
        raise InputError(
            f"{node.name}: a convolution with groups={parts} reads a concatenation; allowed: one layer's channels"
        )
    outer = groups.new(parts, f"{_layer(node)}.groups")
    groups.keep_parts(node.name, layout.segments[0].group, outer)
    result = Layout(1, (Segment(groups.new(out[1], _layer(node)), out[1]),))
    groups.keep_parts(node.name, result.segments[0].group, outer)
    if shape[1] > parts:
        groups.inside[layout.segments[0].group].append(node.parameters["weight"])
    _place_rows(groups, node, result)
    return result


def _place_rows(groups: Groups, node: Node, layout: Layout) -> None:
    for role in ("weight", "bias"):
        if role in node.parameters:
            groups.place(node.parameters[role], 0, layout)


def _layer(node: Node) -> str:
    """The module path of a node with a weight."""
    return node.parameters["weight"].rpartition(".")[0] or node.name


# -- norms, parameters, attention -----------------------------------------------------------------------------------


def batch_norm(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    _expect(node, layouts[0], 1)
    for name in node.parameters.values():
        groups.place(name, 0, layouts[0])
    return layouts[0]


def layer_norm(
    groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: torch.Size
) -> Layout:
    """Statistics over all units, which any order leaves alone."""
    _expect(node, layouts[0], len(out) - 1)
    for name in node.parameters.values():
        groups.place(name, 0, layouts[0])
    return layouts[0]


def group_norm(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """Statistics over all units, or over each of several parts, in which the units stay."""
    _expect(node, layouts[0], 1)
    parts, segments = node.attributes["groups"], layouts[0].segments
    if parts > 1:
        if len(segments) > 1 or segments[0].block > 1:
            raise InputError(
                f"{node.name}: group_norm with {parts} groups reads a concatenation; allowed: one layer's channels"
            )
        outer = groups.new(parts, f"{_layer(node) if node.parameters else node.name}.groups")
        groups.keep_parts(node.name, segments[0].group, outer)
    for name in node.parameters.values():
        groups.place(name, 0, layouts[0])
    return layouts[0]


def with_parameter(
    groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: torch.Size
) -> Layout:
    """A value and a parameter of ``shape`` that has one entry per unit where the value has its units."""
    shape, layout = node.attributes["shape"], layouts[0]
    dim = parameter_dim(node, layout, shapes[0])
    if dim < 0 or shape[dim] != layout.width:
        raise InputError(
            f"{node.name}: {node.operation} of a parameter of shape {tuple(shape)} ({node.parameters['value']}) to "
            f"{layout.width} units; allowed: one entry for each unit"
        )
    if node.operation == "concatenate_parameter" and node.attributes["dim"] % len(out) == layout.dim:
        raise InputError(f"{node.name}: a parameter beside the units of a value; allowed: another dimension")
    groups.place(node.parameters["value"], 0 if "view" in node.attributes else dim, layout)
    return layout


def parameter_dim(node: Node, layout: Layout, shape: Sequence[int]) -> int:
    """Which dimension of a lone parameter, in the shape it is given, lies on the units it is joined with."""
    return layout.dim - (len(shape) - len(node.attributes["shape"]))


def attention(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """Queries, keys and values, side by side: heads change places as a whole, channels inside their head.

    Queries and keys meet in inner products, so their channels go together; values go with the outputs.
    """
    _expect(node, layouts[0], len(shapes[0]) - 1)
    segments = layouts[0].segments
    if len(segments) != 3 or len({(s.size, s.block) for s in segments}) > 1 or segments[0].block > 1:
        raise InputError(
            f"{node.name}: attention reads {len(segments)} groups of units; allowed: queries, keys and values from "
            "one Linear"
        )
    query, key, value = (Layout(layouts[0].dim, (s,)) for s in segments)
    groups.tie(node.name, query, key)
    heads = groups.new(
        segments[0].size // node.attributes["head_dim"], segments[0].group.removesuffix(".query") + ".heads"
    )
    for s in (segments[0], segments[2]):
        groups.keep_parts(node.name, s.group, heads)
    return value


# -- shapes ---------------------------------------------------------------------------------------------------------


def spatial(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """Pooling over the last two dimensions."""
    if layouts[0].dim >= len(shapes[0]) - 2:
        raise InputError(f"{node.name}: {node.operation} pools the dimension of the units")
    return layouts[0]


def flatten(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """Dimensions start to end become one; units widen when they come first of these."""
    start = node.attributes.get("start", 1)
    end = node.attributes.get("end", len(shapes[0]) - 1)
    unit = layouts[0].dim
    if unit < start:
        return layouts[0]
    if unit > end:
        return Layout(unit - (end - start), layouts[0].segments)
    if math.prod(shapes[0][start:unit]) > 1:
        raise InputError(f"{node.name}: flatten from dimension {start}, the units lie on {unit}")
    block = math.prod(shapes[0][unit + 1 : end + 1])
    return Layout(start, tuple(Segment(s.group, s.size, s.block * block) for s in layouts[0].segments))


def mean(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    dims = [dim % len(shapes[0]) for dim in node.attributes["dims"]]
    unit = layouts[0].dim
    if unit in dims or 0 in dims:
        raise InputError(f"{node.name}: mean over the batch or the units; allowed: other dimensions")
    if not node.attributes["keepdim"]:
        unit -= sum(dim < unit for dim in dims)
    return Layout(unit, layouts[0].segments)


def select(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    """One entry, or a range of entries, of one dimension."""
    dim, unit = node.attributes["dim"], layouts[0].dim
    if dim in (0, unit):
        raise InputError(f"{node.name}: picks from the batch or the units; allowed: other dimensions")
    if "index" in node.attributes:
        unit -= dim < unit
    return Layout(unit, layouts[0].segments)


def transpose(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    dims = node.attributes["dims"]
    if dims[0] != 0:
        raise InputError(f"{node.name}: moves the batch from dimension 0; allowed: it stays the first")
    return Layout(dims.index(layouts[0].dim), layouts[0].segments)


def concatenate(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Shapes, out: Any) -> Layout:
    dim = node.attributes["dim"] % len(out)
    dims = {layout.dim for layout in layouts}
    if len(dims) > 1 or dim == 0:
        raise InputError(
            f"{node.name}: concatenates dimension {dim} of values whose units do not lie alike, or of the batch"
        )
    if dim not in dims:  # places side by side, of the same units
        return joined(groups, node, layouts, shapes, out)
    return Layout(dim, tuple(segment for layout in layouts for segment in layout.segments))


def _expect(node: Node, layout: Layout, dim: int) -> None:
    if layout.dim != dim:
        raise InputError(
            f"{node.name}: {node.operation} reads dimension {dim}, its units lie on {layout.dim}"
        )
