"""Places that each image chooses for itself, among those of all images, are places among its own.

Neighbours of points are looked up in a list of all points of all images, ``x.view(n * p, -1)[i + arange(n) * p]``
(DGCNN), or with the number of the image beside that of the point, ``x[arange(n), i]`` (PointNet++): both are
``torch.gather`` along the points of each image.
"""

import math
from collections.abc import Container
from typing import Any

import torch
import torch.fx
from torch import Tensor

from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import tensor_shape
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import RESHAPES, SKIPPED
from stages.core.tracing.rewriting import called, of_the_input, unviewed

MOST_COUNTED = 10**7  # of a constant that is looked at for all images


def places_of_each_image(graph: torch.fx.Graph, tensors: Container[str]) -> None:
    """Rewrite a graph of ATen calls in place. tensors: names of the placeholders that are no input."""
    values = of_the_input(graph, tensors)
    for node in list(graph.nodes):
        if node in values and node.op == "call_function" and opname(node) in ("index", "index_select"):
            found = _chosen(node, values)
            if found is not None:
                _write(graph, node, *found)
    graph.eliminate_dead_code()


def _chosen(node: torch.fx.Node, values: set[torch.fx.Node]) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """The value, (images, places, ...), and the places that each image chooses, (images, ...)."""
    source, lists = node.args[0], node.args[1]
    if opname(node) == "index_select":
        lists = [node.args[2]] if node.args[1] == 0 else []
    lists = list(lists)
    if source not in values or any(own is None for own in lists):
        return None
    if len(lists) == 1:
        return _among_all(source, lists[0], values)
    if len(lists) != 2 or lists[0] in values or lists[1] not in values:
        return None
    chosen, rank = lists[1], len(tensor_shape(lists[1]))
    whole = tensor_shape(chosen)[:1] == [INPUT] == tensor_shape(source)[:1]
    return (source, chosen) if whole and _counts(lists[0], rank, 1) else None


def _among_all(
    source: torch.fx.Node, chosen: torch.fx.Node, values: set[torch.fx.Node]
) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    chosen, whole = unviewed(chosen), source
    while (
        whole.op == "call_function"
        and opname(whole) in RESHAPES | SKIPPED
        and tensor_shape(whole)[0] != INPUT
    ):
        whole = whole.args[0]
    shape = tensor_shape(whole)
    if len(shape) < 2 or shape[0] != INPUT or tensor_shape(source) != [INPUT * shape[1], *shape[2:]]:
        return None
    if opname(chosen) != "add" or chosen.kwargs:
        return None
    for own, starts in (chosen.args[:2], chosen.args[1::-1]):
        if own in values and isinstance(starts, torch.fx.Node) and starts not in values:
            known = tensor_shape(own) == tensor_shape(chosen) and tensor_shape(own)[:1] == [INPUT]
            if known and _counts(starts, len(tensor_shape(own)), shape[1]):
                return whole, own
    return None


def _counts(node: torch.fx.Node, rank: int, step: int) -> bool:
    """Whether a constant of that rank, or one that broadcasts to it, is 0, step, 2 step, ... image after image."""
    shape = tensor_shape(node)
    if len(shape) != rank or shape[0] != INPUT or math.prod(shape) > MOST_COUNTED:
        return False
    found = _value(node, {})
    wanted = torch.arange(INPUT).view([-1] + [1] * (rank - 1)) * step
    return found is not None and bool((found == wanted).all())


def _value(node: torch.fx.Node, known: dict[torch.fx.Node, Any]) -> Tensor | None:
    """What constant calls give for all ``INPUT`` images; None where a tensor of the network is among them."""
    if node not in known:
        given = [_value(own, known) for own in node.all_input_nodes]
        if node.op != "call_function" or any(own is None for own in given):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        known[node] = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
    return known[node]


def _write(graph: torch.fx.Graph, node: torch.fx.Node, whole: torch.fx.Node, chosen: torch.fx.Node) -> None:
    aten, shape = torch.ops.aten, tensor_shape(whole)
    count = math.prod(tensor_shape(chosen)[1:])
    with graph.inserting_before(node):
        places = called(graph, node, aten.reshape.default, chosen, [INPUT, count, *[1] * (len(shape) - 2)])
        places = called(graph, node, aten.expand.default, places, [INPUT, count, *shape[2:]])
        found = called(graph, node, aten.gather.default, whole, 1, places)
        found = called(graph, node, aten.reshape.default, found, tensor_shape(node))
    node.replace_all_uses_with(found)
