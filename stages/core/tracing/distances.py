"""Distances to learned centres as linear maps: radial basis functions, prototypes.

|x - c|^2 is linear in x and in its squares: -2 c x + 1 x^2 + |c|^2. So the units that x has may be in any order, and be
separate, as what any layer reads, and the distances are the outputs of a layer. A distance of other powers, or between
two values, is written out as its differences; ``torch.addmm`` of values is its product and its sum.
"""

from collections.abc import Container

import torch
import torch.fx

from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import tensor_shape
from stages.core.tracing.reader import SKIPPED
from stages.core.tracing.rewriting import called, given_to, of_the_input

WIDER = ("expand", "repeat")
LENGTHS = ("linalg_vector_norm", "norm")


def distances_as_maps(graph: torch.fx.Graph, tensors: Container[str]) -> None:
    """Rewrite a graph of ATen calls in place. tensors: names of the placeholders that are no input."""
    for node in list(graph.nodes):
        if node.op == "call_function" and opname(node) == "cdist":
            _apart(graph, node)
        elif node.op == "call_function" and opname(node) == "addmm":
            _added(graph, node, of_the_input(graph, tensors))
    values = of_the_input(graph, tensors)
    for node in list(graph.nodes):
        if node in values and opname(node) in ("sum", "mean", *LENGTHS):
            _write(graph, node, values)
    graph.eliminate_dead_code()


def _added(graph: torch.fx.Graph, node: torch.fx.Node, values: set[torch.fx.Node]) -> None:
    given, aten = given_to(node), torch.ops.aten
    whole, beta, alpha = given["self"], given.get("beta", 1), given.get("alpha", 1)
    if (whole not in values and beta == alpha == 1) or not {given["mat1"], given["mat2"]} & values:
        return
    with graph.inserting_before(node):
        product = called(graph, node, aten.matmul.default, given["mat1"], given["mat2"])
        if beta != 1:
            whole = called(graph, node, aten.mul.Scalar, whole, beta)
        if alpha != 1:
            product = called(graph, node, aten.mul.Scalar, product, alpha)
        node.replace_all_uses_with(called(graph, node, aten.add.Tensor, product, whole))


def _apart(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """``torch.cdist`` as the length of differences."""
    given, aten = given_to(node), torch.ops.aten
    power = given.get("p", 2)
    with graph.inserting_before(node):
        one = called(graph, node, aten.unsqueeze.default, given["x1"], -2)
        two = called(graph, node, aten.unsqueeze.default, given["x2"], -3)
        apart = called(graph, node, aten.sub.Tensor, one, two)
        node.replace_all_uses_with(called(graph, node, aten.linalg_vector_norm.default, apart, power, [-1]))


def _bare(node: torch.fx.Node) -> torch.fx.Node:
    """What is repeated along dimensions of one entry."""
    while opname(node) in WIDER or (opname(node) in SKIPPED and node.op == "call_function"):
        before, after = tensor_shape(node.args[0]), tensor_shape(node)
        if len(before) != len(after) or any(n != m and n != 1 for n, m in zip(before, after, strict=True)):
            break
        node = node.args[0]
    return node


def _squared(node: torch.fx.Node) -> torch.fx.Node | None:
    if opname(node) in ("pow", "pow_") and node.args[1] == 2:
        return node.args[0]
    if opname(node) == "square":
        return node.args[0]
    return node.args[0] if opname(node) == "mul" and node.args[0] is node.args[1] else None


def _write(graph: torch.fx.Graph, node: torch.fx.Node, values: set[torch.fx.Node]) -> None:
    given, aten = given_to(node), torch.ops.aten
    dims, length = given.get("dim"), opname(node) in LENGTHS
    if length and (given.get("ord", given.get("p", 2)) != 2 or given.get("dtype") is not None):
        return
    dims = [dims] if isinstance(dims, int) else dims
    apart = node.args[0] if length else _squared(node.args[0])
    more, kept = 0.0, given.get("keepdim", False)
    if not dims or len(dims) != 1 or kept or not isinstance(apart, torch.fx.Node):
        return
    if opname(apart) == "add" and not isinstance(apart.args[1], torch.fx.Node):
        apart, more = apart.args[0], float(apart.args[1])  # of F.pairwise_distance
    if opname(apart) not in ("sub", "subtract") or apart.kwargs.get("alpha", 1) != 1:
        return
    sides = [own for own in apart.args[:2] if isinstance(own, torch.fx.Node)]
    if len(sides) != 2 or len({own in values for own in sides}) != 2:
        return
    value, centres = sorted(sides, key=lambda own: own not in values)
    shift = more if value is apart.args[1] else -more
    x, c = _bare(value), _bare(centres)
    shape, dim = tensor_shape(apart), dims[0] % len(tensor_shape(apart))
    before = tensor_shape(x)
    own = [1] * (len(shape) - len(tensor_shape(c))) + tensor_shape(c)
    wide = [d for d, n in enumerate(own) if n > 1 and d != dim]
    if len(before) != len(shape) or len(wide) != 1 or own[dim] != shape[dim] or before[dim] != shape[dim]:
        return
    (at,) = wide
    if before[at] != 1 or any(before[d] != n for d, n in enumerate(shape) if d != at):
        return
    order = [d for d in range(len(shape)) if d not in (at, dim)]
    back = sorted(range(len(order) + 1), key=lambda i: [*order, at][i])
    with graph.inserting_before(node):
        rows = called(
            graph, node, aten.reshape.default, c, [own[at], own[dim]] if at < dim else [own[dim], own[at]]
        )
        rows = rows if at < dim else called(graph, node, aten.permute.default, rows, [1, 0])
        rows = called(graph, node, aten.add.Scalar, rows, shift) if shift else rows
        ones = called(graph, node, aten.add.Scalar, called(graph, node, aten.mul.Scalar, rows, 0.0), 1.0)
        twice = called(graph, node, aten.mul.Scalar, rows, -2.0)
        weight = called(graph, node, aten.cat.default, [twice, ones], 1)
        bias = called(
            graph, node, aten.sum.dim_IntList, called(graph, node, aten.mul.Tensor, rows, rows), [1]
        )
        seen = called(graph, node, aten.permute.default, x, [*order, at, dim])
        seen = called(graph, node, aten.squeeze.dim, seen, len(order))
        both = [seen, called(graph, node, aten.mul.Tensor, seen, seen)]
        found = called(graph, node, aten.cat.default, both, len(order))
        found = called(graph, node, aten.linear.default, found, weight, bias)
        if back != list(range(len(back))):
            found = called(graph, node, aten.permute.default, found, back)
        if opname(node) == "mean":
            found = called(graph, node, aten.div.Scalar, found, float(own[dim]))
        if length:
            positive = called(graph, node, aten.clamp_min.default, found, 0.0)
            found = called(graph, node, aten.sqrt.default, positive)
    node.replace_all_uses_with(found)
