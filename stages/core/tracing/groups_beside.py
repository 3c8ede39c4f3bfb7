"""Groups of channels that a forward puts beside the images are values of their own (SA-Net, SGE, EMA).

(images, groups * channels, ...) is seen as (images * groups, channels, ...), so that one small layer is every group's.
Nothing in between looks at several images: the calls are written once for each group, on its own part of the channels,
and what they give is put side by side where a view takes images and groups apart again. Heads that meet in products
alone are left to ``heads_apart``.
"""

import torch
import torch.fx

from stages.core.graph.nodes import ADAPTIVE, CONVOLUTIONS, POOLS, REDUCTIONS
from stages.core.graph.operations import UNARY
from stages.core.tracing.calls.joins import BINARY_CALLS
from stages.core.tracing.calls.moving import PERMUTES, order_of
from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import PRODUCTS, SOFTMAXES, tensor_shape
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import RESHAPES, SKIPPED
from stages.core.tracing.rewriting import again, called

MOST_GROUPS = 64  # each is written out
LAYERS = (*CONVOLUTIONS, *POOLS, *ADAPTIVE, "batch_norm", "group_norm", "instance_norm", "im2col", "pad")
ALONG = (
    *REDUCTIONS,
    *SOFTMAXES,
    "std",
    "max",
    "min",
    "cat",
    "chunk",
    "split",
    "split_with_sizes",
    "slice",
    "select",
)


def groups_apart(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    for node in list(graph.nodes):
        groups = _groups(node)
        if groups and len(tensor_shape(node)) > 3:
            found = _region(node, groups)
            if found is not None:
                _write(graph, *found, groups)


def _groups(node: torch.fx.Node) -> int:
    """How many groups of channels a view puts beside the images; 0 where it does something else."""
    if (
        node.op != "call_function"
        or opname(node) not in RESHAPES
        or not isinstance(node.args[0], torch.fx.Node)
    ):
        return 0
    shape, before = tensor_shape(node), tensor_shape(node.args[0])
    groups = shape[0] // INPUT if shape and before[:1] == [INPUT] and shape[0] % INPUT == 0 else 0
    kept = groups > 1 and shape[1:] == [before[1] // groups, *before[2:]] and before[1] % groups == 0
    return groups if kept and groups <= MOST_GROUPS else 0


def _region(
    start: torch.fx.Node, groups: int
) -> tuple[list[torch.fx.Node], list[torch.fx.Node], list[torch.fx.Node]] | None:
    """The views that put groups beside images, what is between, and the views that take them apart, in order."""
    inside, seen, waiting = {start}, {start}, [start]
    ends: set[torch.fx.Node] = set()
    while waiting:
        own = waiting.pop()
        around = [*own.users] if own in inside else []
        if own in inside and _groups(own) != groups:
            around += [arg for arg in own.all_input_nodes if tensor_shape(arg)[:1] == [INPUT * groups]]
        for other in around:
            if other in seen:
                continue
            seen.add(other)
            if other.op != "call_function":
                return None
            if opname(other) in RESHAPES and other.args[0] in inside and tensor_shape(other)[:1] == [INPUT]:
                if len(tensor_shape(other)) < 2 or tensor_shape(other)[1] % groups:
                    return None
                ends.add(other)
                continue
            inside.add(other)
            waiting.append(other)
    every = [node for node in start.graph.nodes if node in inside]
    entries = [node for node in every if _groups(node) == groups and node.args[0] not in inside]
    between = [node for node in every if node not in entries]
    if not ends or not all(_of_images(node, inside, groups) for node in between):
        return None
    return entries, between, [node for node in start.graph.nodes if node in ends]


def _of_images(node: torch.fx.Node, inside: set[torch.fx.Node], groups: int) -> bool:
    """Whether a call does the same to every image, whatever is beside it."""
    name, shape = opname(node), tensor_shape(node)
    others = [own for own in node.all_input_nodes if own not in inside]
    if shape and shape[0] != INPUT * groups:
        return False
    if name == "getitem" or name in RESHAPES:
        return True
    if name in PERMUTES:
        return order_of(node, len(shape))[0] == 0
    if name in PRODUCTS:
        return not others and all(tensor_shape(own)[0] == INPUT * groups for own in node.all_input_nodes)
    if name in LAYERS:
        return not any(tensor_shape(own)[:1] == [INPUT] for own in others)
    if name in ALONG:
        if others or len(node.args) < 2:
            return False
        cut = name in ("chunk", "split", "split_with_sizes")
        dims = node.args[2 if cut else 1] if len(node.args) > 1 + cut else 0
        dims = dims if isinstance(dims, list | tuple) else [dims]
        rank = len(tensor_shape(node.all_input_nodes[0]))
        return all(isinstance(d, int) and d % rank for d in dims)
    small = all(len(tensor_shape(own)) < len(shape) or tensor_shape(own)[0] == 1 for own in others)
    return small and (
        name in SKIPPED or name.strip("_") in UNARY or name in BINARY_CALLS or name in ("pow", "rsub")
    )


def _write(
    graph: torch.fx.Graph,
    entries: list[torch.fx.Node],
    between: list[torch.fx.Node],
    ends: list[torch.fx.Node],
    groups: int,
) -> None:
    aten = torch.ops.aten
    made: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted([*entries, *between, *ends], key=order.__getitem__):
        shape, own = tensor_shape(node), node.args[0]
        with graph.inserting_before(node):
            if node in entries:
                width = tensor_shape(own)[1] // groups
                parts = [
                    called(graph, node, aten.slice.Tensor, own, 1, g * width, (g + 1) * width)
                    for g in range(groups)
                ]
                made[node] = [
                    called(graph, node, aten.reshape.default, part, [INPUT, *shape[1:]]) for part in parts
                ]
            elif node in between:
                made[node] = [_again(graph, node, made, g) for g in range(groups)]
            else:
                target = [INPUT, shape[1] // groups, *shape[2:]]
                parts = [called(graph, node, aten.reshape.default, part, target) for part in made[own]]
                node.replace_all_uses_with(called(graph, node, aten.cat.default, parts, 1))
    graph.eliminate_dead_code()


def _again(
    graph: torch.fx.Graph, node: torch.fx.Node, made: dict[torch.fx.Node, list[torch.fx.Node]], group: int
) -> torch.fx.Node:
    """A call on the values of one group."""
    args = torch.fx.node.map_arg(node.args, lambda own: made[own][group] if own in made else own)
    if opname(node) in RESHAPES:
        return called(graph, node, torch.ops.aten.reshape.default, args[0], [INPUT, *tensor_shape(node)[1:]])
    return again(graph, node, args)
