"""A map of one channel whose places are all on one dimension for a while keeps a dimension for that channel.

A mask over places is written ``softmax(conv(x).view(n, -1), 1).view(n, 1, h, w)``: in between, the one unit would lie
on no dimension of its own, as in ``one_unit``. All that is done to (n, places) is done to (n, 1, places).
"""

from collections.abc import Sequence

import torch
import torch.fx

from stages.core.graph.nodes import CONVOLUTIONS, REDUCTIONS
from stages.core.graph.operations import UNARY
from stages.core.tracing.calls.joins import BINARY_CALLS
from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import SOFTMAXES, tensor_shape
from stages.core.tracing.reader import RESHAPES, SKIPPED
from stages.core.tracing.rewriting import again, called

OVER_PLACES = (*SOFTMAXES, *REDUCTIONS, "std")


def channel_kept(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    changed = False
    for node in list(graph.nodes):
        found = _region(node) if _drops_channel(node) else None
        if found is not None:
            _write(graph, node, *found)
            changed = True
    if changed:
        graph.eliminate_dead_code()


def _drops_channel(node: torch.fx.Node) -> bool:
    """Whether a call sees a map of one channel, which a layer or a sum over channels gives, as a line of places."""
    if node.op != "call_function" or opname(node) not in RESHAPES:
        return False
    shape, source = tensor_shape(node), node.args[0]
    before = tensor_shape(source)
    if len(shape) != 2 or len(before) < 3 or before[1] != 1 or before[0] != shape[0] or shape[1] == 1:
        return False
    while isinstance(source, torch.fx.Node) and source.op == "call_function":
        name = opname(source)
        if name in CONVOLUTIONS or (name in REDUCTIONS and source.args[1:2] in ((1,), ([1],))):
            return True
        if not _elementwise(source) and name != "batch_norm":
            return False
        source = source.args[0]
    return False


def _elementwise(node: torch.fx.Node) -> bool:
    name = opname(node)
    return name in SKIPPED or name.strip("_") in UNARY or name in BINARY_CALLS


def _region(start: torch.fx.Node) -> tuple[list[torch.fx.Node], list[torch.fx.Node]] | None:
    """What reads a line of places, in order, and the views that give it a channel again; None where others read it."""
    inside, ends, waiting = {start}, [], [start]
    while waiting:
        for user in waiting.pop().users:
            if user in inside or user in ends:
                continue
            if user.op == "call_function" and opname(user) in RESHAPES and tensor_shape(user)[1:2] == [1]:
                ends.append(user)
            elif user.op == "call_function" and (_elementwise(user) or _over_places(user)):
                inside.add(user)
                waiting.append(user)
            else:
                return None
    between = [node for node in start.graph.nodes if node in inside and node is not start]
    closed = all(own in inside for node in between for own in node.all_input_nodes)
    return (between, ends) if closed and ends else None


def _over_places(node: torch.fx.Node) -> bool:
    """Whether a call works along the places, and leaves their dimension there."""
    name = opname(node)
    if name not in OVER_PLACES or len(node.args) < 2:
        return False
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    return all(d in (1, -1) for d in dims) and len(tensor_shape(node)) == 2


def _write(
    graph: torch.fx.Graph,
    start: torch.fx.Node,
    between: Sequence[torch.fx.Node],
    ends: Sequence[torch.fx.Node],
) -> None:
    images, places = tensor_shape(start)
    reshape = torch.ops.aten.reshape.default
    with graph.inserting_before(start):
        made = {start: called(graph, start, reshape, start.args[0], [images, 1, places])}
    for node in between:
        args = torch.fx.node.map_arg(node.args, lambda own: made.get(own, own))
        if opname(node) in OVER_PLACES:
            args = (args[0], [-1] if isinstance(node.args[1], list | tuple) else -1, *args[2:])
        with graph.inserting_before(node):
            made[node] = again(graph, node, args)
    for node in ends:
        with graph.inserting_before(node):
            whole = called(graph, node, reshape, made[node.args[0]], tensor_shape(node))
        node.replace_all_uses_with(whole)
