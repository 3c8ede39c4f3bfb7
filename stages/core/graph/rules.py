"""The rules of the operations: what each says about the units of its inputs, and where they lie on its output.

rule(units, node, inputs, shape of the output, shapes of the parameters) -> the output's ``Value``. Shapes are those of
one image, (1, ...). A rule that does not apply is an InputError that names the node.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.core.graph.axes import NONE, SeveralDimensionsError, Units, Value, join
from stages.core.graph.nodes import Node
from stages.core.graph.widening import repeats_one, widens
from stages.core.runtime.errors import InputError

Shapes = Mapping[str, Sequence[int]]  # by role
Rule = Callable[[Units, Node, Sequence[Value], torch.Size, Shapes], Value]


def same(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Elementwise: on one value, on several, or on values and a parameter."""
    value = inputs[0]
    if len(inputs) == 1:
        rank = len(out) - len(value.shape)
        value = Value(
            value.labels.reshape([1] * rank + list(value.labels.shape)),
            tuple(d + rank for d in value.dims),
            out,
            value.common,
        )
    for other in inputs[1:]:
        value = join(units, node.name, value, other, out, places=True)
    for role, name in node.parameters.items():
        shape = node.attributes.get("view", shapes[role])
        alone = repeats_one(inputs[0], value, shape)  # each entry with the one unit
        if len(inputs) == 1 and (alone or widens(inputs[0], out, shape)):
            units.fixed += [value.labels] if alone else []
            value = on_dim(
                units.new(out[(dim := value.dims[0] if alone else len(out) - 1)], node.path), dim, out
            )
        place_parameter(units, node, name, shape, shapes[role], value)
    return value


def place_parameter(
    units: Units, node: Node, name: str, seen: Sequence[int], own: Sequence[int], value: Value
) -> None:
    """A parameter that broadcasts to a value, as ``seen``; ``own``: its shape in the state dict."""
    ahead = len(value.shape) - len(seen)
    if ahead < 0:
        raise InputError(f"{node.name}: {name} has more dimensions than what it is joined with")
    held = {d + ahead: d for d, n in enumerate(seen) if n != 1}
    dims = [d for d in value.dims if d in held]
    real = (
        {d: i for i, d in enumerate(d for d, n in enumerate(seen) if n != 1)}
        if list(seen) != list(own)
        else None
    )
    for d in dims:
        where = held[d] if real is None else real[held[d]]
        if len(value.dims) == 1:
            units.place(node.name, name, where, value.along(d))
        else:
            _place_part(units, node, name, where, value, d)
    if not dims and len(value.dims) > 1:
        return


def _place_part(units: Units, node: Node, name: str, where: int, value: Value, dim: int) -> None:
    """One of two dimensions that units lie on: that of parts, or the order inside them, which is then one for all."""
    rows = value.labels.movedim(dim, 0).flatten(1)
    if dim == value.dims[-1]:
        units.pinned.append(rows.T)
        return
    parts = units.new(len(rows), f"{node.path}.heads")
    units.put_inside(node.name, rows, parts)
    units.place(node.name, name, where, parts)


# -- linear maps ----------------------------------------------------------------------------------------------------


def as_read(units: Units, node: Node, value: Value) -> Value:
    """What a layer or a norm reads. What is computed from the input alone is alike in every network, wherever features
    lie in it (images with their channels last, time series): its units are then what is read."""
    dim = len(value.shape) - 1 if node.operation == "linear" else 1
    if not value.common or value.dims == (dim,):
        return value
    new = units.new(value.shape[dim], "input")
    units.fixed.append(new)
    return replace(on_dim(new, dim, value.shape), common=True)


def linear(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """A contraction with a weight: it ties nothing, reads the input's units, and its outputs are new ones."""
    value, weight = inputs[0], node.parameters["weight"]
    dim = len(out) - 1 if node.operation == "linear" else 1
    if value.dims and value.dims != (dim,):
        raise SeveralDimensionsError(
            f"{node.name}: {node.operation} reads dimension {dim}, its units lie on {list(value.dims)}; allowed: units "
            "that it reads"
        )
    if node.grouped:
        return _grouped(units, node, value, out, shapes)
    if value.dims:
        units.place(node.name, weight, 0 if node.transposed else 1, value.along(dim))
    new = units.new(out[dim], node.path)
    _place_rows(units, node, new, 1 if node.transposed else 0)
    return on_dim(new, dim, out)


def on_dim(labels: Tensor, dim: int, shape: torch.Size) -> Value:
    return Value(labels.view([-1 if d == dim else 1 for d in range(len(shape))]), (dim,), shape)


def _place_rows(units: Units, node: Node, labels: Tensor, dim: int = 0) -> None:
    units.place(node.name, node.parameters["weight"], dim, labels)
    if "bias" in node.parameters:
        units.place(node.name, node.parameters["bias"], 0, labels)


def _grouped(units: Units, node: Node, value: Value, out: torch.Size, shapes: Shapes) -> Value:
    """Output channels stay with the input channels they read: as one unit, or in a part each."""
    parts, read = node.attributes["groups"], value.along(1)
    if node.transposed and not parts == len(read) == out[1]:
        raise InputError(
            f"{node.name}: a transposed convolution with groups={parts}; allowed: 1, or depthwise"
        )
    if parts == len(read) == out[1]:  # depthwise: acts on every channel alone, as a batch norm does
        _place_rows(units, node, read)
        return Value(value.labels, value.dims, out)
    outer = units.new(parts, f"{node.path}.groups")
    new = units.new(out[1], node.path)
    units.put_inside(node.name, read.view(parts, -1), outer)
    units.put_inside(node.name, new.view(parts, -1), outer)
    if len(read) > parts:
        if bool((read == NONE).any()) or len(read.unique()) < len(read):
            raise InputError(
                f"{node.name}: a convolution with groups={parts} reads a unit twice; allowed: each channel once"
            )
        units.kernels[node.parameters["weight"]] = read.view(parts, -1)
    _place_rows(units, node, new)
    return on_dim(new, 1, out)


def embedding(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """A table with one row for each integer: its columns are units. common: the same in every network (one_hot)."""
    if node.attributes.get("common"):
        return Value(inputs[0].labels[..., None], inputs[0].dims, out, inputs[0].common)
    new = units.new(out[-1], node.path)
    units.place(node.name, node.parameters["weight"], 1, new)
    return on_dim(new, len(out) - 1, out)


# -- norms and other reductions -------------------------------------------------------------------------------------


def channels(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """What acts on every channel of dimension 1 alone (batch norm, PReLU)."""
    value = inputs[0]
    for role, name in node.parameters.items():
        several = math.prod(shapes[role]) > 1 or node.operation != "prelu"
        if several or (value.dims == (1,) and value.shape[1] == 1):
            expect(node, value, 1)
            units.place(node.name, name, 0, value.along(1))
    return Value(value.labels, value.dims, out, value.common)


def layer_norm(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Statistics over the last dimensions; where they hold all units, any order leaves them alone."""
    value = inputs[0]
    over = range(len(out) - node.attributes.get("rank", 1), len(out))
    _check_reduced(node, value, over)
    for role, name in node.parameters.items():
        place_parameter(units, node, name, shapes[role], shapes[role], value)
    return Value(value.labels, value.dims, out)


def group_norm(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Statistics over all units, or over each of several parts, in which the units stay."""
    value, parts = inputs[0], node.attributes["groups"]
    expect(node, value, 1)
    if parts > 1:
        outer = units.new(parts, f"{node.path}.groups")
        units.put_inside(node.name, value.along(1).view(parts, -1), outer)
    for name in node.parameters.values():
        units.place(node.name, name, 0, value.along(1))
    return Value(value.labels, value.dims, out)


def normalised(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Divided by the length along a dimension."""
    _check_reduced(node, inputs[0], [node.attributes["dim"] % len(out)])
    return Value(inputs[0].labels, inputs[0].dims, out)


def _check_reduced(node: Node, value: Value, over: Sequence[int]) -> None:
    """A reduction that keeps its shape: over no units, over all, or over what is inside parts."""
    if len(value.dims) > 1 and value.dims[0] in over and not set(value.dims) <= set(over):
        raise InputError(f"{node.name}: {node.operation} over parts; allowed: over what is inside them")


def softmax(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Over positions, or over what is inside parts; over units at the network's end alone, where they are fixed."""
    value, dim = inputs[0], node.attributes["dim"] % len(out)
    if value.dims == (dim,):
        units.fixed.append(value.labels)
    elif dim in value.dims:
        left = [d for d in value.dims if d != dim]
        if len(left) > 1 and dim < left[0]:  # branches that are weighed, inside parts (ResNeSt)
            first = value.labels.narrow(dim, 0, 1)
            units.tie(node.name, value.labels, first.expand_as(value.labels))
            return Value(first, tuple(left), out, value.common)
        rows = value.labels.movedim(left[0], 0).flatten(1)
        parts = units.new(len(rows), f"{node.name}.parts")
        units.put_inside(node.name, rows, parts)
        if len(left) > 1:  # a table in each part (outlook attention): its rows and columns are places
            units.pinned.append(rows)
            return on_dim(parts, left[0], out)
    return Value(value.labels, value.dims, out, value.common)


def reduced(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Mean, sum, maximum over dimensions without units, over what is inside parts, or over all units for each."""
    value, keep = inputs[0], node.attributes.get("keepdim", False)
    if "spread" in node.attributes:
        expect(node, value, node.attributes["spread"])
        return Value(value.labels, value.dims, out, value.common)
    rank = len(value.shape)
    over = sorted(dim % rank for dim in node.attributes["dims"])
    if set(value.dims) & set(over) and set(value.dims) <= set(over) and not value.common:
        raise InputError(f"{node.name}: {node.operation} over the units; allowed: other dimensions")
    labels, dims = value.labels, value.dims
    inside = [d for d in dims if d in over]
    if inside and not value.common:
        left = [d for d in dims if d not in over]
        if len(left) > 1:
            raise InputError(
                f"{node.name}: {node.operation} over a part of the units; allowed: other dimensions"
            )
        rows = labels.movedim(left[0], 0).flatten(1)
        if units.share_parts(rows):  # they are inside wider parts: entries of one unit
            outer = rows.amax(1)
            units.tie(node.name, rows, outer[:, None].expand_as(rows))
        else:
            outer = units.new(len(rows), f"{node.name}.parts")
            units.put_inside(node.name, rows, outer)
        labels, dims = on_dim(outer, left[0], value.shape).labels, tuple(left)
    for dim in over:
        labels = labels.narrow(dim, 0, 1)
    dims = tuple(d for d in dims if d not in over)
    if not keep:
        labels = labels.reshape([n for d, n in enumerate(labels.shape) if d not in over])
        dims = tuple(d - sum(o < d for o in over) for d in dims)
    return Value(labels, dims, out, value.common)


# -- places ---------------------------------------------------------------------------------------


def spatial(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Pooling and resizing of the dimensions from 2 on."""
    value = inputs[0]
    if any(d > 1 for d in value.dims):
        raise InputError(
            f"{node.name}: {node.operation} works on dimension {value.dims[-1]}, which holds units"
        )
    return Value(value.labels, value.dims, out, value.common)


def neighbours(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """What reads units beside each other: those of a part stay there, in their order."""
    if len(inputs[0].dims) > 1:
        rows = inputs[0].labels.movedim(1, 0).flatten(1)
        units.put_inside(node.name, rows, units.new(len(rows), f"{node.name}.parts"))
        units.pinned.append(rows)
    else:
        units.fixed.append(inputs[0].labels)
    return Value(inputs[0].labels, inputs[0].dims, out, inputs[0].common)


def expect(node: Node, value: Value, dim: int) -> None:
    if value.dims and value.dims != (dim,):
        raise InputError(
            f"{node.name}: {node.operation} reads dimension {dim}, its units lie on {list(value.dims)}"
        )
