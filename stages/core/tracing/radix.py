"""A grouped convolution whose groups are added up again is one convolution for each of what is added (ResNeSt).

Split attention (Zhang et al. 2020) cuts the outputs of a convolution with radix * cardinality groups in radix parts and
adds these, each weighted: units of different groups meet entry by entry, so that the groups of one convolution would
have to stay whole together. As one convolution for each part, which reads its own part of the channels, they are units
like others (and with a cardinality above one the parts of a grouped convolution).
"""

import torch
import torch.fx

from stages.core.graph.nodes import CONVOLUTIONS, REDUCTIONS
from stages.core.tracing.calls.joins import BINARY_CALLS
from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import SOFTMAXES, tensor_shape
from stages.core.tracing.reader import RESHAPES
from stages.core.tracing.rewriting import arguments_of, called, cut_in, of_each_entry

DEFAULTS = (None, None, None, 1, 0, 1, 1)  # of a convolution's arguments, the last of which are its groups
CUTS = ("split", "chunk", "split_with_sizes", "unbind")


def radix_apart(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    for node in list(graph.nodes):
        parts = _parts(node)
        if parts:
            _write(graph, node, parts)


def _parts(node: torch.fx.Node) -> int:
    """In how many parts the outputs of a grouped convolution are cut that are then joined; 0 where they are not."""
    if node.op != "call_function" or opname(node) not in CONVOLUTIONS:
        return 0
    _, weight, *_, groups = arguments_of(node, DEFAULTS)
    if groups == 1 or tensor_shape(weight)[:2] == [groups, 1]:
        return 0
    waiting, found = [node], 0
    while waiting:
        own = waiting.pop()
        for user in own.users:
            if of_each_entry(user) or (opname(user) == "batch_norm" and user.args[0] is own):
                waiting += [user] * (opname(user) not in RESHAPES)
            elif opname(user) in CUTS:
                found = found or _cut(user)
        found = found or max((_viewed(user) for user in own.users if opname(user) in RESHAPES), default=0)
    return found if found and groups % found == 0 else 0


def _cut(node: torch.fx.Node) -> int:
    """The number of equal parts that a call cuts channels in, where some are joined with others."""
    parts = node.meta["val"]
    alike = len({tuple(part.shape) for part in parts}) == 1 and len(parts) > 1
    whole = alike and parts[0].shape[1] * len(parts) == tensor_shape(node.args[0])[1]
    return len(parts) if whole and _joined(node) else 0


def _joined(node: torch.fx.Node) -> bool:
    """Whether two of several values meet entry by entry, or in what is made of them entry by entry."""
    of: dict[torch.fx.Node, set[int]] = {user: {user.args[1]} for user in node.users}
    waiting = list(of)
    while waiting:
        own = waiting.pop()
        for user in own.users:
            if not (of_each_entry(user) or opname(user) in BINARY_CALLS):
                continue
            met = [of[arg] for arg in user.all_input_nodes if arg in of]
            if len(set().union(*met)) > max(map(len, met)):
                return True
            if user not in of:
                of[user] = set().union(*met)
                waiting.append(user)
    return False


def _viewed(node: torch.fx.Node) -> int:
    """The number of parts as which a view has channels, (n, parts, channels of each, ...), that are then added up."""
    shape, before = tensor_shape(node), tensor_shape(node.args[0])
    parts = shape[1] if len(shape) == len(before) + 1 else 0
    if parts < 2 or shape != [before[0], parts, before[1] // parts, *before[2:]]:
        return 0
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            name = opname(user)
            if name in REDUCTIONS and user.args[1:2] in ((1,), ([1],)):
                return parts
            if name == "unbind" and user.args[1:2] == (1,) and _joined(user):
                return parts
            if of_each_entry(user) or name in BINARY_CALLS or name in SOFTMAXES:
                waiting.append(user)
    return 0


def _write(graph: torch.fx.Graph, node: torch.fx.Node, parts: int) -> None:
    value, weight, bias, stride, padding, dilation, groups = arguments_of(node, DEFAULTS)
    with graph.inserting_before(node):
        values = cut_in(graph, node, value, 1, parts)
        weights, biases = cut_in(graph, node, weight, 0, parts), cut_in(graph, node, bias, 0, parts)
        found = [
            called(graph, node, node.target, *own, stride, padding, dilation, groups // parts)
            for own in zip(values, weights, biases, strict=True)
        ]
        whole = called(graph, node, torch.ops.aten.cat.default, found, 1)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
