"""Values added up at places that are constant, messages along the edges of a graph, are a constant map over places."""

import math
from collections.abc import Container

import torch
import torch.fx

from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import tensor_shape
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import SKIPPED
from stages.core.tracing.rewriting import called, given_to, of_the_input

ADDED_UP = ("index_add", "scatter_add", "scatter_reduce")
ZEROS = ("zeros", "new_zeros", "zeros_like")


def edges_as_maps(graph: torch.fx.Graph, tensors: Container[str]) -> None:
    """Rewrite a graph of ATen calls in place. tensors: names of the placeholders that are no input."""
    values, aten = of_the_input(graph, tensors), torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or opname(node) not in ADDED_UP:
            continue
        given = given_to(node)
        whole, source, dim = given["self"], given.get("source", given.get("src")), given["dim"]
        ends, shape = _one_line(given["index"], dim % len(tensor_shape(node))), tensor_shape(node)
        adds = given.get("reduce", "sum") == "sum" and given.get("include_self", True)
        even = opname(node) == "index_add" or tensor_shape(given["index"]) == tensor_shape(source)
        plain = adds and even and given.get("alpha", 1) == 1 and source in values
        if not plain or ends is None or ends in values or shape[dim] % INPUT == 0:
            continue
        with graph.inserting_before(node):
            count = ends.meta["val"].numel()
            found = called(graph, node, aten.reshape.default, ends, [count])
            found = called(graph, node, aten.one_hot.default, found, shape[dim])
            found = called(graph, node, aten.to.dtype, found, source.meta["val"].dtype)
            found = called(graph, node, aten.matmul.default, _turned(graph, node, source, dim), found)
            found = _turned(graph, node, found, dim)
            if opname(whole) not in ZEROS:
                found = called(graph, node, aten.add.Tensor, found, whole)
        node.replace_all_uses_with(found)
    graph.eliminate_dead_code()


def _turned(graph: torch.fx.Graph, like: torch.fx.Node, value: torch.fx.Node, dim: int) -> torch.fx.Node:
    return called(graph, like, torch.ops.aten.transpose.int, value, dim, -1)


def _one_line(index: torch.fx.Node, dim: int) -> torch.fx.Node | None:
    """The list of places that an index was expanded from, where it is alike along all dimensions but one."""
    rank, count = len(tensor_shape(index)), tensor_shape(index)[dim if len(tensor_shape(index)) > 1 else 0]
    while True:
        shape = tensor_shape(index)
        at = dim + len(shape) - rank if rank > 1 else 0
        if math.prod(shape) == count and 0 <= at < len(shape) and shape[at] == count:
            return index
        if index.op != "call_function" or opname(index) not in (*SKIPPED, "expand", "repeat"):
            return None
        index = index.args[0]
