"""A mean over all units that each unit then meets again: what norms that are written by hand are made of.

The layer norm of (x - x.mean(1)) / x.var(1).sqrt(), the global response norm of ConvNeXt v2 (the lengths of channels
over their mean): the mean has one entry for all units, and all that reads it is elementwise, until it meets them. Such
a reduction is *spread*: it gives each unit the mean, so that in a merged network each unit has that of its own
network's units (stages.core.merged.unit_layers). One that a layer reads (CBAM) looks at a part
(stages.core.graph.heads).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.axes import Value
from stages.core.graph.nodes import REDUCTIONS, Graph, Node


class Spread:
    """Says which reductions of a graph are spread."""

    def __init__(
        self,
        graph: Graph,
        x: Tensor,
        run: Callable[[Node, list[Tensor]], Tensor],
        rule: Callable[[Node], rules.Rule],
    ) -> None:
        """x: one image. run: what a node gives, of which the shape counts. rule: that of a node."""
        self.graph, self._x, self._run, self._rule = graph, x, run, rule

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of every value of the image; mostly not asked for."""
        values, last = {self.graph.nodes[0].name: self._x}, self.graph.last_uses()
        shapes = {self.graph.nodes[0].name: self._x.shape}
        for node in self.graph.nodes[1:]:
            values[node.name] = found = self._run(node, [values[name] for name in node.inputs])
            shapes[node.name] = found.shape
            for name in last[node.name]:
                del values[name]
        return shapes

    def of(self, node: Node, inputs: Sequence[Value]) -> Node:
        """The node, spread over the dimension of its units where that is what it is for."""
        a = node.attributes
        if node.operation not in REDUCTIONS or not a["keepdim"] or "spread" in a:
            return node
        value, rank = inputs[0], len(inputs[0].shape)
        over = {d % rank for d in a["dims"]}
        if (
            value.common
            or len(value.dims) != 1
            or value.dims[0] not in over
            or value.shape[value.dims[0]] == 1
        ):
            return node
        dim = value.dims[0]
        return (
            dataclasses.replace(node, attributes={**a, "spread": dim})
            if self._meets(node, dim - rank, value.shape[dim])
            else node
        )

    def _meets(self, node: Node, dim: int, width: int) -> bool:
        """Whether all that reads it is elementwise, until it meets as many units on ``dim`` (counted from the end)."""
        users, waiting = self.graph.users(), [node.name]
        while waiting:
            name = waiting.pop()
            if not users[name]:
                return False
            for user in users[name]:
                if self._rule(user) is not rules.same:
                    return False
                if self.shapes[user.name][dim] == 1:
                    waiting.append(user.name)
                elif self.shapes[user.name][dim] != width:
                    return False
        return True
