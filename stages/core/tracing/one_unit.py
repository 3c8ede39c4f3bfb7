"""One number for each place, of a linear map with one output, keeps the dimension of that output.

Scores of places are written ``softmax(linear(x).squeeze(-1), 1).unsqueeze(-1)``: in between, the one unit would lie on
no dimension, and a merged network, which has one for each of its networks, could not have them side by side. What is
elementwise or a softmax does the same with that dimension kept; where another call gives one back, it changes places.
"""

from collections.abc import Sequence

import torch
import torch.fx

from stages.core.graph.operations import UNARY
from stages.core.tracing.calls.joins import BINARY_CALLS
from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import SOFTMAXES, tensor_shape
from stages.core.tracing.reader import RESHAPES, SKIPPED
from stages.core.tracing.rewriting import again, called

LINEAR = ("linear", "matmul", "addmm", "mm", "bmm")


def unit_kept(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    changed = False
    for node in list(graph.nodes):
        _as_matrix(graph, node)
        _as_product(graph, node)
    for node in list(graph.nodes):
        last = _drops_unit(node)
        found = _between(node) if last else None
        if found and found[1]:
            _write(graph, node, *found)
            changed = True
    if changed:
        graph.eliminate_dead_code()


def _as_matrix(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """A product of a value with a vector of weights is that with a matrix of one column, whose dimension goes."""
    if node.op != "call_function" or opname(node) not in ("matmul", "mv"):
        return
    value, weights = node.args[:2]
    if len(tensor_shape(weights)) != 1 or len(tensor_shape(value)) < 2:
        return
    aten = torch.ops.aten
    with graph.inserting_before(node):
        matrix = called(graph, weights, aten.unsqueeze.default, weights, 1)
        column = called(graph, node, aten.matmul.default, value, matrix)
    node.target, node.args, node.kwargs = aten.squeeze.dim, (column, len(tensor_shape(node))), {}


def _as_product(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """What an einsum weighs places by (bn,bnd->bd, or ->bnd) is a row of a product, or multiplied entry by entry."""
    if node.op != "call_function" or opname(node) != "einsum" or len(node.args[1]) != 2:
        return
    given, _, out = node.args[0].replace(" ", "").partition("->")
    (few, weights), (many, value) = sorted(
        zip(given.split(","), node.args[1], strict=True), key=lambda own: len(own[0])
    )
    left = [letter for letter in many if letter not in few]
    if len(few) < 2 or len(left) != 1 or len({*many}) != len(few) + 1 != len(many) or "." in given:
        return
    aten, behind = torch.ops.aten, few + left[0]
    with graph.inserting_before(node):
        value = called(graph, node, aten.permute.default, value, [many.index(letter) for letter in behind])
        if out == behind:
            column = called(graph, node, aten.unsqueeze.default, weights, -1)
            node.target, node.args = aten.mul.Tensor, (column, value)
        elif out == few[:-1] + left[0]:
            row = called(graph, node, aten.unsqueeze.default, weights, -2)
            whole = called(graph, node, aten.matmul.default, row, value)
            node.target, node.args = aten.squeeze.dim, (whole, -2)


def _drops_unit(node: torch.fx.Node) -> bool:
    """Whether a call drops the last dimension, of one entry, of what a linear map with one output gives."""
    if node.op != "call_function" or opname(node) not in RESHAPES:
        return False
    source = node.args[0]
    if tensor_shape(source) != [*tensor_shape(node), 1] or len(tensor_shape(node)) < 2:
        return False
    while isinstance(source, torch.fx.Node) and source.op == "call_function":
        if opname(source) in LINEAR:
            return True
        if not _elementwise(source):
            return False
        source = source.args[0]
    return False


def _elementwise(node: torch.fx.Node) -> bool:
    """Whether a call does one thing to every entry of its one tensor, or divides them by a sum over places."""
    name = opname(node)
    plain = name in SKIPPED or name.strip("_") in UNARY or name in SOFTMAXES or name in BINARY_CALLS
    return plain and len(node.all_input_nodes) == 1


def _between(node: torch.fx.Node) -> tuple[list[torch.fx.Node], list[torch.fx.Node]] | None:
    """What reads a value up to where a dimension comes back, and the calls that give it; None where others read it."""
    inside, ends, waiting = [], [], [node]
    while waiting:
        own = waiting.pop()
        for user in own.users:
            if user.op == "call_function" and _gives_back(user) is not None:
                ends.append(user)
            elif user.op == "call_function" and _elementwise(user):
                inside.append(user)
                waiting.append(user)
            else:
                return None
    return inside, ends  # each reads one value: what it reads stands before it


def _gives_back(node: torch.fx.Node) -> int | None:
    """Where a call puts a dimension of one entry behind that of the images."""
    if opname(node) not in RESHAPES:
        return None
    shape, before = tensor_shape(node), tensor_shape(node.args[0])
    if len(shape) != len(before) + 1:
        return None
    return next((d for d in range(len(shape) - 1, 0, -1) if [*before[:d], 1, *before[d:]] == shape), None)


def _write(
    graph: torch.fx.Graph,
    start: torch.fx.Node,
    inside: Sequence[torch.fx.Node],
    ends: Sequence[torch.fx.Node],
) -> None:
    """inside: in the order of the graph."""
    made, rank = {start: start.args[0]}, len(tensor_shape(start))
    for node in inside:
        args = torch.fx.node.map_arg(node.args, lambda own: made.get(own, own))
        if opname(node) in SOFTMAXES:
            args = (args[0], args[1] % rank, *args[2:])
        with graph.inserting_before(node):
            made[node] = again(graph, node, args)
    for node in ends:
        at = _gives_back(node)
        order = [*range(at), rank, *range(at, rank)]
        with graph.inserting_before(node):
            found = called(graph, node, torch.ops.aten.permute.default, made[node.args[0]], order)
        node.replace_all_uses_with(found)
