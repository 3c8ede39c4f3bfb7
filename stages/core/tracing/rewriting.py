"""Calls of ATen in the place of others, before a graph is read."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from stages.core.graph.operations import UNARY
from stages.core.tracing.export import opname
from stages.core.tracing.reader import SKIPPED


def called(graph: torch.fx.Graph, like: torch.fx.Node, target: Any, *args: Any) -> torch.fx.Node:
    """A call, where ``graph`` inserts, that stands where ``like`` stands in the user's code."""
    found = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda own: own.meta["val"])
    found.meta = {**like.meta, "val": target(*values)}
    return found


def of_each_entry(node: torch.fx.Node) -> bool:
    """Whether a call does one thing to every entry of its one tensor."""
    name = opname(node)
    return len(node.all_input_nodes) == 1 and (name in SKIPPED or name.strip("_") in UNARY)


def cut_in(
    graph: torch.fx.Graph, like: torch.fx.Node, value: torch.fx.Node | None, dim: int, parts: int
) -> list[torch.fx.Node | None]:
    """A tensor in equal parts of a dimension; nothing in as many."""
    if value is None:
        return [None] * parts
    size = math.ceil(value.meta["val"].shape[dim] / parts)
    cut = torch.ops.aten.slice.Tensor
    return [called(graph, like, cut, value, dim, i * size, (i + 1) * size) for i in range(parts)]


def arguments_of(node: torch.fx.Node, defaults: Sequence[Any]) -> list[Any]:
    """The first arguments of a call, as many as there are defaults, whether given by place or by name."""
    names = [own.name for own in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name, own) for name, own in zip(names, defaults, strict=False)]
