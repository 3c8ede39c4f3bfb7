"""Channels whose places are units of their own: what a pixel shuffle gives.

What is elementwise leaves such units where they are. Whatever else reads them reads whole channels: each is one part of
as many units, which keep their order.
"""

import math
from collections.abc import Sequence

import torch

from stages.core.graph import rules
from stages.core.graph.axes import Units, Value
from stages.core.graph.moves import padded
from stages.core.graph.nodes import Node


def as_channels(units: Units, node: Node, inputs: Sequence[Value], rule: rules.Rule) -> list[Value]:
    """The values that a node reads, as channels where it reads these."""
    beside = rule is rules.same and any(value.dims == (1,) for value in inputs)
    if not beside and rule not in (rules.linear, rules.channels, rules.spatial, padded):
        return list(inputs)
    return [_whole_channels(units, node, value) for value in inputs]


def _whole_channels(units: Units, node: Node, value: Value) -> Value:
    shape = value.shape
    if len(shape) < 4 or value.dims != tuple(range(1, len(shape))) or value.held or value.common:
        return value
    rows = [own.unique() for own in value.labels.movedim(1, 0).flatten(1)]
    count = {len(own) for own in rows}
    alone = len(torch.cat(rows).unique()) == sum(map(len, rows))
    if len(count) > 1 or not alone or count == {math.prod(shape[2:])}:  # each again and again
        return value
    channels = units.new(len(rows), f"{node.path}.channels")
    units.put_inside(node.name, torch.stack(rows), channels)
    units.pinned.append(torch.stack(rows))
    return rules.on_dim(channels, 1, shape)
