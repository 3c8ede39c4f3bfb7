"""Linear maps beside units: over positions (MLP-Mixer, ResMLP, gMLP), and along the units themselves (ECA).

A map over positions (``mix``) reads a dimension that holds no units, while the units lie on another one, each of which
it does the same to. What it gives are units too, but of the layer alone: they lie *across* the units of the value, one
order for all of these. They can be put in order (``Inner`` of one part), never be separate. Where they meet positions
they keep theirs.

A convolution whose kernel runs over the dimension of the units (``along``) reads neighbours: all of them are one part,
in the order that they have. Neither map has entries of its own for each unit: in a merged network every owner of units
has a copy of it. A batch norm of positions, or of the one channel that such a map gives (triplet attention), does one
thing to all units: each has numbers of its own (``norm_parameter``).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.axes import Units, Value
from stages.core.graph.nodes import COPIED, Graph, Node
from stages.core.runtime.errors import InputError


def mixing(node: Node, inputs: Sequence[Value], shapes: rules.Shapes) -> Node:
    """The node as ``mix`` or ``along``, where its linear map reads another dimension than the units', or as
    ``norm_parameter``, where its norm does; else the node."""
    if node.operation == "batch_norm" and inputs[0].dims and not inputs[0].common:
        if 1 in inputs[0].dims or 0 in inputs[0].dims:
            return node
        view = {"view": [inputs[0].shape[1], *[1] * (len(inputs[0].shape) - 2)]}
        return dataclasses.replace(node, operation="norm_parameter", attributes={**node.attributes, **view})
    if not node.linear or node.transposed or not inputs[0].dims:
        return node
    value, weight = inputs[0], shapes["weight"]
    dim = len(value.shape) - 1 if node.operation == "linear" else 1
    if dim in value.dims or value.common:
        return node
    a = node.attributes
    if node.operation != "linear" and not (
        all(n == 1 for n in (*weight[2:], *a["stride"])) and not any(a["padding"])
    ):
        if len(value.dims) > 1 or value.across is not None:
            raise InputError(
                f"{node.name}: a convolution over positions with kernel {tuple(weight[2:])}, its units lie on "
                f"{list(value.dims)}; allowed: on one dimension"
            )
        taps = math.prod(weight[1:])
        return dataclasses.replace(node, operation="along", attributes={**a, "taps": taps})
    return dataclasses.replace(node, operation="mix", attributes={"dim": dim})


def places_first(
    graph: Graph, parameters: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]
) -> Graph:
    """Square maps over the last of several dimensions of the input as maps over positions: the edges of a graph whose
    nodes the network adds up later. parameters, shapes: of tensors and values."""
    of_input, nodes = set[str](), list[Node]()
    for node in graph.nodes:
        rank = len(shapes[node.inputs[0]]) if node.inputs else 0
        if node.operation == "linear" and node.inputs[0] in of_input and rank > 2:
            size = parameters[node.parameters["weight"]]
            node = (
                dataclasses.replace(node, operation="mix", attributes={"dim": rank - 1})
                if size[0] == size[1]
                else node
            )
        if not node.parameters and all(name in of_input for name in node.inputs):
            of_input.add(node.name)
        nodes.append(node)
    return Graph(tuple(nodes))


def mixed(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: rules.Shapes) -> Value:
    """The units that lie on the value stay; those across it are what the map reads, and new ones."""
    value, dim, weight = inputs[0], node.attributes["dim"], node.parameters["weight"]
    if value.common:  # of the input, whose features are on another dimension
        value = rules.as_read(units, dataclasses.replace(node, operation="conv1d"), value)
    if dim in value.dims or (value.dims[:1] == (0,) and 1 not in value.shape):
        raise InputError(
            f"{node.name}: {node.operation} over units, images or what is beside them; allowed: over positions"
        )
    name = node.path
    if value.across is not None and value.across.shape[dim] > 1:
        units.place(node.name, weight, 1, value.across.reshape(-1))
    elif value.across is not None:
        units.fixed.append(value.across)
    new = units.new(out[dim], name)
    units.place(node.name, weight, 0, new)
    if "bias" in node.parameters:
        units.place(node.name, node.parameters["bias"], 0, new)
    whole = units.new(1, f"{name}.positions")
    units.across.append(whole)
    units.put_inside(node.name, new[None], whole)
    line = new.view([-1 if d == dim else 1 for d in range(len(out))])
    return Value(value.labels, value.dims, out, across=line)


def along(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: rules.Shapes) -> Value:
    """Units that are read by their neighbours: they are one part, in their order, as what it gives is."""
    value = inputs[0]
    if len(value.dims) != 1 or value.dims[0] < 2 or out[value.dims[0]] != value.shape[value.dims[0]]:
        raise InputError(
            f"{node.name}: a convolution along units that gives {out[value.dims[-1]] if value.dims else 'none'} of "
            f"them; allowed: as many as it reads, on one dimension"
        )
    rows = value.along(value.dims[0])[None]
    units.put_inside(node.name, rows, units.new(1, f"{node.name}.parts"))
    units.pinned.append(rows)
    return Value(value.labels, value.dims, out, value.common)


def carried(
    units: Units,
    node: Node,
    inputs: Sequence[Value],
    found: Value,
    run: Callable[..., Tensor],
    elementwise: bool,
    shapes: rules.Shapes,
) -> Value:
    """What an operation gives, with the units that lie across its inputs, where it keeps them; else they are fixed."""
    held = [value for value in inputs if value.across is not None]
    if not held or found.across is not None or node.operation in COPIED:
        return found
    across = None
    if node.operation == "rearrange":
        across = _rearranged(node, held[0], run)
    elif node.operation == "linear" and held[0].across.shape[-1] == 1:
        across = held[0].across
    elif elementwise and len({len(value.shape) for value in inputs}) == 1:
        across = _joined(units, node, inputs)
        if across is not None and not _placed(units, node, across, shapes):
            across = None
    if across is None:
        units.fixed += [value.across for value in held]
        # Units of another value that meet what lies across, entry by entry, are in its order.
        lines = {d for own in held for d in range(-own.across.dim(), 0) if own.across.shape[d] > 1}
        met = [own for own in inputs if own.across is None and {d - len(own.shape) for d in own.dims} & lines]
        units.fixed += [own.labels for own in met]
        return found
    return dataclasses.replace(found, across=across)


def _joined(units: Units, node: Node, inputs: Sequence[Value]) -> Tensor | None:
    """The units across values that are joined elementwise; None where one has positions in their place."""
    across = next(value.across for value in inputs if value.across is not None)
    dim = max(range(across.dim()), key=lambda d: across.shape[d])
    for value in inputs:
        if value.across is None and value.shape[dim] > 1:
            return None
        if value.across is not None and value.across is not across:
            if value.across.shape != across.shape:
                return None
            units.tie(node.name, across, value.across)
    return across


def _placed(units: Units, node: Node, across: Tensor, shapes: rules.Shapes) -> bool:
    """Whether parameters that are joined with a value lie alike on what is across it, and are noted to."""
    dim = max(range(across.dim()), key=lambda d: across.shape[d])
    for role, name in node.parameters.items():
        seen = list(node.attributes.get("view", shapes[role]))
        at = dim - (across.dim() - len(seen))
        if at < 0 or seen[at] == 1:
            continue
        if seen != list(shapes[role]) or seen[at] != across.shape[dim]:
            return False
        units.place(node.name, name, at, across.reshape(-1))
    return True


def _rearranged(node: Node, value: Value, run: Callable[..., Tensor]) -> Tensor | None:
    """The units across a value whose dimensions change places; None where they are cut or joined with others."""
    labels = run([value.across.expand(value.shape) + 1], {}, node.attributes) - 1
    for dim in range(labels.dim()):
        line = labels.movedim(dim, 0).flatten(1)[:, :1]
        if labels.shape[dim] == value.across.numel() and bool(
            (labels == line.view([-1 if d == dim else 1 for d in range(labels.dim())])).all()
        ):
            return line.reshape([-1 if d == dim else 1 for d in range(labels.dim())])
    return None
