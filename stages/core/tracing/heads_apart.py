"""Images and heads on one dimension, as attention is written with torch.bmm, are two dimensions again.

A view (images * heads, ...) of a value is one (images, heads, ...) just as well, and so is all that is elementwise, a
softmax or a product of such values, until another view brings the images back to a dimension of their own. Where
something else reads such a value (windows, which are places) it stays as it is.
"""

import math
from collections.abc import Sequence

import torch
import torch.fx

from stages.core.graph.operations import UNARY
from stages.core.tracing.calls.joins import BINARY_CALLS
from stages.core.tracing.export import opname
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.permuting import PERMUTES, order_of
from stages.core.tracing.reader import RESHAPES, SKIPPED
from stages.core.tracing.rewriting import called

PRODUCTS = ("bmm", "matmul")
SOFTMAXES = ("softmax", "_softmax", "log_softmax", "_log_softmax")


def heads_apart(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    region: dict[torch.fx.Node, int] = {}  # of values with images and heads on one dimension
    where: dict[torch.fx.Node, int] = {}  # that dimension
    lead: dict[int, tuple[int, int]] = {}
    joined: dict[int, int] = {}
    spoiled: set[int] = set()
    products: set[int] = set()

    def root(number: int) -> int:
        while number in joined:
            number = joined[number]
        return number

    for node in graph.nodes:
        inside = [region[own] for own in node.all_input_nodes if own in region]
        if not inside:
            first = _first(node)
            if first is not None:
                region[node], where[node] = len(lead), first[0]
                lead[len(lead)] = first[1]
            continue
        for other in inside[1:]:
            if root(other) != root(inside[0]):
                joined[root(other)] = root(inside[0])
        whole = root(inside[0])
        leads = {lead[number] for number in inside}
        if len(leads) > 1 or not _supported(node, where, next(iter(leads))):
            spoiled.update(inside)
            continue
        if opname(node) in PRODUCTS:
            products.update(inside)
        at = _at(node, where, math.prod(leads.pop()))
        if at is not None:
            region[node], where[node] = whole, at
    bad, good = {root(n) for n in spoiled}, {root(n) for n in products}
    made: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(graph.nodes):
        inside = [own for own in node.all_input_nodes if own in made]
        if inside or (node in region and root(region[node]) in good - bad):
            number = region[inside[0]] if inside else region[node]
            _write(graph, node, lead[number], made, where)
    if made:
        graph.eliminate_dead_code()


def tensor_shape(node: torch.fx.Node) -> list[int]:
    """Of what a call gives; of several tensors none."""
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, torch.Tensor) else []


def _first(node: torch.fx.Node) -> tuple[int, tuple[int, int]] | None:
    """The dimension of a view that two dimensions are joined to, and their extents."""
    if (
        node.op != "call_function"
        or opname(node) not in RESHAPES
        or not isinstance(node.args[0], torch.fx.Node)
    ):
        return None
    shape, before = tensor_shape(node), tensor_shape(node.args[0])
    for at in range(min(2, len(shape)) if len(shape) == 3 <= len(before) else 0):
        heads = shape[at] // INPUT
        if shape[at] % INPUT or heads < 2 or shape[:at] != before[:at]:
            continue
        if before[at] == INPUT:
            return at, (INPUT, heads)
        if before[at : at + 2] == [heads, INPUT]:
            return at, (heads, INPUT)
    return None


def _at(node: torch.fx.Node, where: dict[torch.fx.Node, int], extent: int) -> int | None:
    """The dimension of a call's value that images and heads are on, None where a view takes them apart."""
    (first, *_) = (own for own in node.all_input_nodes if own in where)
    if opname(node) in RESHAPES:
        shape = tensor_shape(node)
        return shape.index(extent) if len(shape) == 3 and extent in shape else None
    return (
        order_of(node, len(tensor_shape(node))).index(where[first])
        if opname(node) in PERMUTES
        else where[first]
    )


def _repeated(node: torch.fx.Node, lead: Sequence[int]) -> tuple[torch.fx.Node, list[torch.fx.Node]] | None:
    """What is there once for each head, or once at all, and is repeated for images and heads; and how it is turned."""
    turns: list[torch.fx.Node] = []
    while node.op == "call_function" and opname(node) in PERMUTES and order_of(node, 3)[0] == 0:
        turns.insert(0, node)
        node = node.args[0]
    if node.op != "call_function" or opname(node) not in ("repeat", "expand"):
        return None
    shape, source = tensor_shape(node), node.args[0]
    once = [1, *shape[1:]] if opname(node) == "expand" else [lead[1], *shape[1:]]
    fits = len(shape) == 3 and shape[0] == math.prod(lead) and tensor_shape(source) == once
    return (source, turns) if fits and lead[0] == INPUT else None


def _supported(node: torch.fx.Node, where: dict[torch.fx.Node, int], lead: Sequence[int]) -> bool:
    """Whether a call does the same where images and heads are two dimensions."""
    name, others = opname(node), [own for own in node.all_input_nodes if own not in where]
    at = {where[own] for own in node.all_input_nodes if own in where}
    if len(at) > 1:
        return False
    if name in RESHAPES or name in PERMUTES:
        return True
    if name in PRODUCTS:
        given = all(_repeated(own, lead) for own in others)
        return at == {0} and given and all(len(tensor_shape(own)) == 3 for own in node.all_input_nodes)
    if name == "gather":
        dim = node.args[1] % len(tensor_shape(node))
        return at == {0} and dim > 0 and all(_repeated(own, lead) for own in others)
    if name in SOFTMAXES:
        return node.args[1] % len(tensor_shape(node)) not in at
    if name in SKIPPED or name.strip("_") in UNARY:
        return not others
    small = all(len(tensor_shape(own)) < 3 or tensor_shape(own)[0] == 1 for own in others)
    joins = name in BINARY_CALLS or name in ("rsub", "masked_fill", "where")
    return joins and (not others or (at == {0} and small))


def _with_lead(
    graph: torch.fx.Graph, node: torch.fx.Node, given: torch.fx.Node, lead: Sequence[int], name: str
) -> torch.fx.Node:
    """What is repeated for images and heads, for a product as it was before, for an index on two dimensions."""
    found, turns = _repeated(given, lead) or (given, [])
    if found is given:
        return given
    with graph.inserting_before(node):
        for turn in turns:
            found = called(graph, turn, turn.target, found, *turn.args[1:])
        if name == "gather":
            return called(
                graph, node, torch.ops.aten.expand.default, found, [*lead, *tensor_shape(found)[1:]]
            )
        return called(graph, node, torch.ops.aten.unsqueeze.default, found, 0)


def _write(
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    lead: Sequence[int],
    made: dict[torch.fx.Node, torch.fx.Node],
    where: dict[torch.fx.Node, int],
) -> None:
    """The call of a node with one more dimension; where its own value has images and heads on one, in its place."""
    aten, name, args = (
        torch.ops.aten,
        opname(node),
        torch.fx.node.map_arg(node.args, lambda own: made.get(own, own)),
    )
    shape, target, kwargs = tensor_shape(node), node.target, dict(node.kwargs)
    if node in where:
        shape[where[node] : where[node] + 1] = lead
    before = next((where[own] for own in node.all_input_nodes if own in where), 0)
    if name in RESHAPES:
        target, args, kwargs = aten.reshape.default, (args[0], shape), {}
    elif name in PRODUCTS or name == "gather":
        given = node.all_input_nodes
        args = tuple(_with_lead(graph, node, own, lead, name) if own in given else own for own in args)
        if name == "gather":
            args = (args[0], args[1] % len(tensor_shape(node)) + 1, args[2])
        else:
            target = aten.matmul.default
    elif name in PERMUTES:
        order = [
            n
            for d in order_of(node, len(tensor_shape(node)))
            for n in ((d, d + 1) if d == before else (d + (d > before),))
        ]
        target, args, kwargs = aten.permute.default, (args[0], order), {}
    elif name in SOFTMAXES:
        dim = args[1] % len(tensor_shape(node))
        args = (args[0], dim + (dim > before), *args[2:])
    with graph.inserting_after(node):
        found = graph.call_function(target, args, kwargs)
    found.meta = {**node.meta, "val": torch.empty(shape, dtype=node.meta["val"].dtype, device="meta")}
    if node in where:
        made[node] = found
    else:
        node.replace_all_uses_with(found)
