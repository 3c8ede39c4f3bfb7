"""Windows of places taken apart and added up again (im2col and col2im; the outlook attention of VOLO)."""

import math
from collections.abc import Sequence

import torch

from stages.core.graph import rules
from stages.core.graph.axes import Units, Value
from stages.core.graph.nodes import Node


def unfolded(
    units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: rules.Shapes
) -> Value:
    """The places of each window beside each other: a unit becomes as many entries as a window has places."""
    value = rules.spatial(units, node, inputs, out, shapes)
    labels = value.labels.flatten(2)
    if 1 in value.dims:
        labels = labels.repeat_interleave(math.prod(node.attributes["kernel_size"]), 1)
    return Value(labels, value.dims, out, value.common)


def folded(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: rules.Shapes) -> Value:
    """Windows added up where they meet: the entries of one window are tied, and one unit again."""
    value = inputs[0]
    rules.expect(node, value, 1)
    if not value.dims:
        return Value(value.labels.unsqueeze(-1), (), out, value.common)
    rows = value.along(1).view(out[1], -1)
    first = rows.amax(1)
    units.tie(node.name, rows, first[:, None].expand_as(rows))
    return Value(rules.on_dim(first, 1, out).labels, value.dims, out, value.common)
