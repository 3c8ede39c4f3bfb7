"""Calls of ATen in the place of others, before a graph is read."""

import math
from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from stages.core.graph.operations import UNARY
from stages.core.tracing.calls.joins import BINARY_CALLS
from stages.core.tracing.export import opname
from stages.core.tracing.folding import made_like
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import RESHAPES, SKIPPED


def called(
    graph: torch.fx.Graph, like: torch.fx.Node, target: Any, *args: Any, **kwargs: Any
) -> torch.fx.Node:
    """A call, where ``graph`` inserts, that stands where ``like`` stands in the user's code."""
    found = graph.call_function(target, args, kwargs)
    given, named = torch.fx.node.map_arg((args, kwargs), lambda own: _without_numbers(own.meta["val"]))
    found.meta = {**like.meta, "val": target(*given, **named)}
    return found


def again(graph: torch.fx.Graph, node: torch.fx.Node, args: Sequence[Any]) -> Any:
    """The same call of other values, where ``graph`` inserts; what passes its value on is that value."""
    return args[0] if opname(node) in SKIPPED else called(graph, node, node.target, *args, **node.kwargs)


def _without_numbers(value: Any) -> Any:
    """Tensors of the same shapes on the meta device: what is read may stand on others."""
    if isinstance(value, list | tuple):
        return [_without_numbers(own) for own in value]
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


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


def unviewed(node: torch.fx.Node) -> torch.fx.Node:
    """What a value is another view of."""
    while node.op == "call_function" and opname(node) in RESHAPES | SKIPPED:
        node = node.args[0]
    return node


def given_to(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names, whether given by place or by name."""
    names = [own.name for own in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def arguments_of(node: torch.fx.Node, defaults: Sequence[Any]) -> list[Any]:
    """The first arguments of a call, as many as there are defaults."""
    names, given = [own.name for own in node.target._schema.arguments], given_to(node)
    return [given.get(name, own) for name, own in zip(names, defaults, strict=False)]


def of_the_input(graph: torch.fx.Graph, tensors: Container[str]) -> set[torch.fx.Node]:
    """The calls that depend on the input. tensors: names of the placeholders that are none."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            found |= {node} if node.name not in tensors else set()
        elif not made_like(node) and any(own in found for own in node.all_input_nodes):
            found.add(node)
    return found


SHAPED = ("expand_as", "view_as", "reshape_as")  # none is left behind it


def of_known_shape(graph: torch.fx.Graph) -> None:
    """What takes another value's shape alone does not depend on that value: it is told the shape."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op == "call_function" and opname(node) in SHAPED:
            kind = aten.expand if opname(node) == "expand_as" else aten.reshape
            with graph.inserting_before(node):
                shape = list(node.args[1].meta["val"].shape)
                node.replace_all_uses_with(called(graph, node, kind.default, node.args[0], shape))
    graph.eliminate_dead_code()


def unrepeated(graph: torch.fx.Graph, tensors: Container[str]) -> None:
    """A constant that is repeated for all images, and for what is beside them, only to be joined with a value, is
    broadcast as it is (the mask of criss-cross attention)."""
    values = of_the_input(graph, tensors)
    for node in list(graph.nodes):
        if node in values or node.op != "call_function" or opname(node) not in ("repeat", "expand"):
            continue
        source, shape = node.args[0], list(node.meta["val"].shape)
        before = list(source.meta["val"].shape)
        if len(before) != len(shape) or before != [1, *shape[1:]] or shape[0] % INPUT or shape[0] == INPUT:
            continue
        inside, waiting = [node], [node]
        while waiting:
            for user in waiting.pop().users:
                if user not in values and of_each_entry(user):
                    inside.append(user)
                    waiting.append(user)
        ends = {user for own in inside for user in own.users if user not in inside}
        if all(opname(end) in BINARY_CALLS and _reaches(end, values, shape[0]) for end in ends):
            for own in inside[1:]:
                own.meta = {**own.meta, "val": own.meta["val"][:1]}
            node.replace_all_uses_with(source)


def _reaches(node: torch.fx.Node, values: Container[torch.fx.Node], images: int) -> bool:
    """Whether a call joins a value of so many images."""
    return any(own in values and own.meta["val"].shape[:1] == (images,) for own in node.all_input_nodes)


def reduced_apart(graph: torch.fx.Graph) -> None:
    """A mean, sum or largest over all channels of what was put side by side, which a layer reads, is made of those of
    each (LSKNet): the same units may lie there twice."""
    aten = torch.ops.aten
    joins = {
        "mean": aten.add.Tensor,
        "sum": aten.add.Tensor,
        "amax": aten.maximum.default,
        "max": aten.maximum.default,
    }
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or opname(node) not in joins
            or len(node.args) < 3
            or node.args[2] is not True
        ):
            continue
        source, dims = node.args[0], node.args[1]
        if opname(source) != "cat" or dims not in (1, [1]) or source.args[1:] != (1,) or not node.users:
            continue
        parts = source.args[0]
        if any(own.meta["val"].shape != parts[0].meta["val"].shape for own in parts):
            continue
        ends = [node] if opname(node) != "max" else list(node.users)
        if any(end is not node and (opname(end) != "getitem" or end.args[1] != 0) for end in ends):
            continue
        if any(opname(user) != "cat" for end in ends for user in end.users):
            continue  # norms by hand: each unit meets its mean again
        kind = aten.amax.default if opname(node) == "max" else node.target
        with graph.inserting_before(node):
            whole, *others = (called(graph, node, kind, own, [1], True) for own in parts)
            for own in others:
                whole = called(graph, node, joins[opname(node)], whole, own)
            if opname(node) == "mean":
                whole = called(graph, node, aten.div.Tensor, whole, len(parts))
        for end in ends:
            end.replace_all_uses_with(whole)
    graph.eliminate_dead_code()
