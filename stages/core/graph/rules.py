"""The rules of the operations: what each says about the units of its inputs, and where they lie on its output.

rule(units, node, inputs, shape of the output, shapes of the parameters) -> the output's ``Value``. Shapes are those of
one image, (1, ...). A rule that does not apply is an InputError that names the node.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph.axes import NONE, SeveralDimensionsError, Units, Value, compact, join
from stages.core.graph.crossed import crosses, product
from stages.core.graph.nodes import Node
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
            value.common and not node.parameters,
        )
    for other in inputs[1:]:
        value = join(units, node.name, value, other, out, places=True)
    for role, name in node.parameters.items():
        shape = node.attributes.get("view", shapes[role])
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
    """A table with one row for each integer: its columns are units."""
    new = units.new(out[-1], node.path)
    units.place(node.name, node.parameters["weight"], 1, new)
    return on_dim(new, len(out) - 1, out)


# -- norms and other reductions -------------------------------------------------------------------------------------


def channels(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """What acts on every channel of dimension 1 alone (batch norm, PReLU)."""
    value = inputs[0]
    for role, name in node.parameters.items():
        if math.prod(shapes[role]) > 1 or (value.dims == (1,) and value.shape[1] == 1):
            expect(node, value, 1)
            units.place(node.name, name, 0, value.along(1))
    return Value(value.labels, value.dims, out, value.common and not node.parameters)


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


# -- products of two values -----------------------------------------------------------------------------------------


def matmul(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """(..., m, k) times (..., k, n): what it sums over is tied, and lies inside the parts that both share."""
    if crosses(*inputs):
        return product(units, node, *inputs, out)
    a, b = (_batched(value, len(out)) for value in inputs)
    last, before = len(out) - 1, len(out) - 2
    if (
        before in a.dims and last not in a.dims and not {before, last} & set(b.dims)
    ):  # values times turned scores
        both = torch.Size([*out[:-1], 1])
        found = join(units, node.name, _at(a, both), _at(b, both), both)
        units.hints += [(found.labels, ".value")] if len(found.dims) > 1 else []
        return Value(found.labels, found.dims, out, a.common and b.common)
    if before in a.dims or (last in b.dims and last in a.dims):
        raise InputError(
            f"{node.name}: {node.operation} of units with units; allowed: sums over what lies in parts"
        )
    if last in a.dims or before in b.dims:  # scores: queries with keys
        if not (last in a.dims and before in b.dims) or last in b.dims:
            raise InputError(
                f"{node.name}: {node.operation} sums over units of one side; allowed: units of both"
            )
        return _scores(units, node, a, b, out)
    weights = Value(a.labels, a.dims, a.shape)  # (..., m, k): one for each part
    both = torch.Size([*out[:-2], 1, out[-1]])
    found = join(units, node.name, _at(weights, both), _at(b, both), both)
    units.hints += [(found.labels, ".value")] if len(found.dims) > 1 else []
    return Value(found.labels, found.dims, out, a.common and b.common)


def _batched(value: Value, rank: int) -> Value:
    ahead = rank - len(value.shape)
    return Value(
        value.labels.reshape([1] * ahead + list(value.labels.shape)),
        tuple(d + ahead for d in value.dims),
        torch.Size([1] * ahead + list(value.shape)),
        value.common,
    )


def _at(value: Value, shape: torch.Size) -> Value:
    """A value that has no units on the dimension before the last, seen in another shape."""
    return Value(value.labels, value.dims, shape, value.common)


def _scores(units: Units, node: Node, a: Value, b: Value, out: torch.Size) -> Value:
    x, y = a.labels.transpose(-1, -2), b.labels  # (..., k, 1) both
    parts = [d for d in a.dims if d < len(out) - 2]
    if [d for d in b.dims if d < len(out) - 2] != parts or len(parts) > 1 or x.numel() != y.numel():
        raise InputError(
            f"{node.name}: {node.operation} of units that do not lie alike; allowed: equal layouts"
        )
    units.tie(node.name, x, y)
    units.hints.append((x, ".query"))
    return _heads(units, node, x, parts, out)


def _heads(units: Units, node: Node, x: Tensor, parts: Sequence[int], out: torch.Size) -> Value:
    """New units, one for each part of the units x."""
    dim = parts[0] if parts else 1
    rows = x.movedim(dim, 0).flatten(1) if parts else x.reshape(1, -1)
    heads = units.new(len(rows), f"{_origin(units, x)}.heads")
    if (len(rows) == 1 and len(rows[0].unique()) > 1) or len(rows) > 1:
        units.put_inside(node.name, rows, heads)
    return on_dim(heads, dim, out)


def _origin(units: Units, x: Tensor) -> str:
    first = int(x[x != NONE].min()) if bool((x != NONE).any()) else 0
    return next(n for n, start, size in reversed(units.origins) if start <= first < start + size)


def attention(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Scaled dot products: scores of queries with keys, and a mean of values for each part. A mask has parts too."""
    query, key, value, *masks = inputs
    swapped = Value(key.labels.transpose(-1, -2), tuple(_swap(key.dims, len(out))), key.shape)
    scores = torch.Size([*out[:-1], key.shape[-2]])
    found = matmul(units, node, [query, swapped], scores, shapes)
    for mask in masks:
        found = join(units, node.name, found, _batched(mask, len(out)), scores)
    for role, name in node.parameters.items():
        place_parameter(units, node, name, shapes[role], shapes[role], found)
    return matmul(units, node, [found, value], out, shapes)


def _swap(dims: Sequence[int], rank: int) -> list[int]:
    swap = {rank - 1: rank - 2, rank - 2: rank - 1}
    return sorted(swap.get(d, d) for d in dims)


# -- what moves entries about ---------------------------------------------------------------------------------------


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


def moved(
    units: Units,
    node: Node,
    inputs: Sequence[Value],
    out: torch.Size,
    shapes: Shapes,
    run: Callable[..., Tensor],
) -> Value:
    """Labels go where their entries go; what is new has none."""
    labels = run([value.full + 1 for value in inputs], {}, node.attributes) - 1
    dims = _dims_of_ones(node, inputs, out, run)
    return compact(labels, out, dims, all(value.common for value in inputs))


def _dims_of_ones(
    node: Node, inputs: Sequence[Value], out: torch.Size, run: Callable[..., Tensor]
) -> set[int]:
    """Where a dimension of a single unit goes, which labels do not show; of what is cut out, where units were."""
    if node.operation in ("slice", "pick"):
        return set(inputs[0].dims)
    ones = [d for d in inputs[0].dims if inputs[0].shape[d] == 1]
    if node.operation == "rearrange":
        return _ones_rearranged(node, inputs[0], ones)
    if not ones or len(inputs) > 1:
        return {d for d in ones if len(inputs[0].shape) == len(out)}
    if node.operation == "select":
        return {d - (d > node.attributes["dim"] % len(inputs[0].shape)) for d in ones}
    return {d + len(out) - len(inputs[0].shape) for d in ones}


def _ones_rearranged(node: Node, value: Value, ones: Sequence[int]) -> set[int]:
    """The same of a rearrangement, where a dimension of units may also be cut into one head and what is in it."""
    line = [(d, i) for d, own in enumerate(node.attributes["atoms"]) for i in range(len(own))]
    heads = {(d, 0) for d, own in enumerate(node.attributes["atoms"]) if d and own[0] == 1 < len(own)}
    where = [g for g, own in enumerate(node.attributes["groups"]) for _ in range(own)]
    return {
        where[at]
        for at, i in enumerate(node.attributes["order"])
        if line[i][0] in ones or (line[i] in heads and line[i][0] in value.dims)
    }


def constant(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """The same for each image: a table, or a parameter with units on its last dimension (of maps, the channels)."""
    if node.attributes.get("common"):
        even = node.attributes.get("even", False)
        return Value(torch.full([1] * len(out), NONE), (), out, True, even=even)
    dim = 1 if len(out) > 3 else len(out) - 1
    new = units.new(out[dim], node.path)
    units.place(node.name, node.parameters["value"], dim, new)
    return on_dim(new, dim, out)


def concatenated(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Units side by side, or places side by side of the same units. A parameter (a class token) is such a place."""
    dim = node.attributes["dim"] % len(out)
    held = {d for value in inputs for d in value.dims}
    if dim in held:
        if node.parameters:
            raise InputError(
                f"{node.name}: a parameter beside the units of a value; allowed: another dimension"
            )
        units.beside.append([value.labels for value in inputs])
        labels = torch.cat([value.full for value in inputs], dim)
        return compact(labels, out, {dim, *(held - {dim})}, all(value.common for value in inputs))
    found = Value(
        inputs[0].labels, inputs[0].dims, out, all(v.common for v in inputs) and not node.parameters
    )
    for other in inputs[1:]:
        found = join(units, node.name, found, Value(other.labels, other.dims, out, other.common), out)
    for role, name in node.parameters.items():
        place_parameter(units, node, name, shapes[role], shapes[role], found)
    return found


def expect(node: Node, value: Value, dim: int) -> None:
    if value.dims and value.dims != (dim,):
        raise InputError(
            f"{node.name}: {node.operation} reads dimension {dim}, its units lie on {list(value.dims)}"
        )


def padded(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Beside units come entries of no unit; places beside others have the same units."""
    value, pad = inputs[0], list(node.attributes["pad"])
    for i in range(len(pad) // 2):
        if len(out) - 1 - i not in value.dims:
            pad[2 * i : 2 * i + 2] = 0, 0
    if any(pad) and node.attributes.get("mode", "constant") != "constant":
        raise InputError(f"{node.name}: pads units with units; allowed: with zeros")
    shape = torch.Size([out[d] if d in value.dims else n for d, n in enumerate(value.labels.shape)])
    held = value.labels.expand(
        [value.shape[d] if d in value.dims else n for d, n in enumerate(value.labels.shape)]
    )
    labels = F.pad(held + 1, pad) - 1
    assert labels.shape == shape
    inside = 2 * (len(out) - 1 - value.dims[-1]) if value.dims else 0
    within = len(value.dims) == 2 and any(pad[inside : inside + 2])
    if any(pad) and not within and not value.common and node.attributes.get("value"):
        raise InputError(f"{node.name}: pads units with {node.attributes['value']}; allowed: with zeros")
    if within:
        labels = torch.where(labels == NONE, _parts_of(units, node, value), labels)
    found = compact(labels, out, value.dims, value.common)
    return Value(found.labels, found.dims, out, value.common)


def _parts_of(units: Units, node: Node, value: Value) -> Tensor:
    """A unit for each part of a value with units inside parts, as it broadcasts, for what is padded there."""
    dim = value.dims[0]
    rows = value.labels.movedim(dim, 0).flatten(1)
    outer = units.new(len(rows), f"{node.path}.parts")
    units.put_inside(node.name, rows, outer)
    return on_dim(outer, dim, value.shape).labels


moving = partial  # moving(moved, run=...) makes a rule
