"""Heads that a forward puts beside the images, for a kernel that all heads have in common (MViT v2), kept apart.

(images, heads, places, units) is seen as (images * heads, units, ...) by a depthwise convolution, and back. Units would
lie on the dimension of the images; here heads stay on their own, and in a merged network each has a kernel of its own.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.axes import Units, Value
from stages.core.graph.nodes import CONVOLUTIONS, Graph, Node
from stages.core.runtime.errors import InputError


def heads_apart(graph: Graph, parameters: Mapping[str, Sequence[int]]) -> Graph:
    """The same network: depthwise convolutions of images and heads as convolutions of each head.

    parameters: the shape of each tensor of the state dict.
    """
    users, by_name = graph.users(), {node.name: node for node in graph.nodes}
    changed: dict[str, Node] = {}
    for node in graph.nodes:
        before = by_name[node.inputs[0]] if node.inputs else node
        behind = users[node.name]
        if (
            not _depthwise(node, parameters)
            or before.operation != "rearrange"
            or users[before.name] != [node]
        ):
            continue
        heads = _heads(before)
        if heads and behind and all(_splits(own, heads) for own in behind):
            a, weight = node.attributes, node.parameters["weight"]
            shape = parameters[weight]
            settings = {key: a[key] for key in ("stride", "padding", "dilation")}
            settings["view"] = [shape[0], *shape[2:]]
            first, *others = before.attributes["groups"]
            groups = {**before.attributes, "groups": [1, first - 1, *others]}
            changed[before.name] = Node(before.name, "rearrange", before.inputs, groups)
            changed[node.name] = Node(
                node.name, "convolve_parameter", node.inputs, settings, {"value": weight}
            )
            for own in behind:
                b = own.attributes
                split = {**b, "atoms": [[1], [heads], *b["atoms"][1:]], "free": [0, None, *b["free"][1:]]}
                changed[own.name] = Node(own.name, "rearrange", own.inputs, split)
    return Graph(tuple(changed.get(node.name, node) for node in graph.nodes))


def _depthwise(node: Node, parameters: Mapping[str, Sequence[int]]) -> bool:
    if node.operation not in CONVOLUTIONS or not node.grouped or "bias" in node.parameters:
        return False
    return list(parameters[node.parameters["weight"]][:2]) == [node.attributes["groups"], 1]


def _heads(node: Node) -> int:
    """How many entries a rearrangement puts beside the images; 0 where it puts others there."""
    a = node.attributes
    sizes = [size for own in a["atoms"] for size in own]
    beside = a["order"][1 : a["groups"][0]]
    return math.prod(sizes[i] for i in beside) if a["free"][0] == 0 == a["order"][0] and beside else 0


def _splits(node: Node, heads: int) -> bool:
    a = node.attributes
    return node.operation == "rearrange" and a["atoms"][0] == [1, heads] and a["free"][0] == 0


def convolve(x: Tensor, weight: Tensor, attributes: Mapping[str, object], heads: int, width: int) -> Tensor:
    """x: (n, heads, width, ...). weight: (width, ...), or with heads in front; each unit has a kernel, without bias."""
    spatial = attributes["view"][1:]
    settings = {key: value for key, value in attributes.items() if key != "view"}
    kernels = weight.reshape(-1, width, *spatial).expand(heads, *[-1] * (len(spatial) + 1))
    kernels = kernels.reshape(heads * width, 1, *spatial)
    run = getattr(F, CONVOLUTIONS[len(spatial) - 1])
    y = run(x.flatten(1, 2), kernels, groups=heads * width, **settings)
    return y.unflatten(1, (heads, width))


def convolved(
    units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: rules.Shapes
) -> Value:
    """Every unit stays where it is; the order inside is one for all heads."""
    value = inputs[0]
    if len(value.dims) > 1:
        rows = value.labels.movedim(value.dims[0], 0).flatten(1)
        units.put_inside(node.name, rows, units.new(len(rows), f"{node.name}.heads"))
    rules.place_parameter(
        units, node, node.parameters["value"], node.attributes["view"], shapes["value"], value
    )
    return Value(value.labels, value.dims, out)


def looked_up(
    units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: rules.Shapes
) -> Value:
    """A matrix for all heads, or one for each, over what is inside them: its order is one for all, heads are left.

    What is inside may be places already, as those that another table gave.
    """
    value, table, last = inputs[0], shapes["value"], len(out) - 1
    if len(value.dims) == 1 and value.dims[0] < last - 1:
        seen = [*table[:-2], 1, 1]
        rules.place_parameter(units, node, node.parameters["value"], seen, seen, value)
        return Value(value.labels, value.dims, out)
    if len(value.dims) == 2 and value.dims[1] == last - 1 and _own_table(value, table, out):
        _over_places(units, node, value, table, out)
        return Value(value.labels, value.dims, out)
    if len(value.dims) != 2 or value.dims[1] != last:
        raise InputError(
            f"{node.name}: a table over units that lie on {list(value.dims)}; allowed: over what is inside heads"
        )
    head = value.dims[0]
    if head == last - 1:
        raise InputError(
            f"{node.name}: a table over heads that are its rows; allowed: heads ahead of the rows"
        )
    rows = value.labels.movedim(head, 0).flatten(1)
    heads = units.new(len(rows), f"{node.name}.heads")
    units.put_inside(node.name, rows, heads)
    units.pinned.append(rows)
    own = head - (len(out) - len(table))
    if own >= 0 and table[own] > 1:
        units.place(node.name, node.parameters["value"], own, heads)
    return rules.on_dim(heads, head, out)


def _own_table(value: Value, table: Sequence[int], out: torch.Size) -> bool:
    """Whether each head has a table of its own."""
    own = value.dims[0] - (len(out) - len(table))
    return own >= 0 and table[own] == value.shape[value.dims[0]] > 1


def _over_places(units: Units, node: Node, value: Value, table: Sequence[int], out: torch.Size) -> None:
    """Tables of heads over places (synthesizers, gMLP with heads): what is inside a head stays there, in any order."""
    rows = value.labels.movedim(value.dims[0], 0).flatten(1)
    heads = units.new(len(rows), f"{node.name}.heads")
    units.put_inside(node.name, rows, heads)
    units.place(node.name, node.parameters["value"], value.dims[0] - (len(out) - len(table)), heads)
