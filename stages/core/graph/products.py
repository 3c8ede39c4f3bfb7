"""The rules of products of two values: scores of queries with keys, means of values, attention as one call.

What a product sums over is tied; with heads it lies inside parts that both sides share (stages.core.graph.rules).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.graph.axes import NONE, Units, Value, join
from stages.core.graph.crossed import crosses, product
from stages.core.graph.nodes import Node
from stages.core.graph.rules import Shapes, on_dim, place_parameter
from stages.core.runtime.errors import InputError


def matmul(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """(..., m, k) times (..., k, n): what it sums over is tied, and lies inside the parts that both share."""
    if node.attributes.get("weights"):  # several sums over places: hops of attention, bilinear pooling
        units.fixed.append(inputs[0].labels)
        return Value(inputs[1].labels, inputs[1].dims, out)
    if all(value.common for value in inputs):
        return Value(torch.full([1] * len(out), NONE), (), out, True)
    if crosses(*inputs):
        return product(units, node, *inputs, out)
    a, b = (_batched(value, len(out)) for value in inputs)
    last, before = len(out) - 1, len(out) - 2
    if a.common != b.common and last in a.dims and before in b.dims:
        return _of_the_input(units, node, b if a.common else a, out)
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
    labels = _of_each_head(units, node, found) if len(a.dims) == 1 else found.labels
    return Value(labels, found.dims, out, a.common and b.common)


def _of_the_input(units: Units, node: Node, met: Value, out: torch.Size) -> Value:
    """A sum over features of the input: what meets them has their one order (PointNet's transformation of points)."""
    found = units.new(out[-1], f"{node.name}.features")
    units.fixed += [met.labels, found]
    return on_dim(found, len(out) - 1, out)


def _of_each_head(units: Units, node: Node, value: Value) -> Tensor:
    """Labels that say which head they are of, where heads have the same units: values that all have in common."""
    labels, head = value.labels, value.dims[0] if value.dims else 0
    if len(value.dims) < 2 or labels.shape[head] == 1 or bool((labels != labels.narrow(head, 0, 1)).any()):
        return labels
    own = units.new(labels.numel(), f"{node.name}.each").view(labels.shape)
    units.tie(node.name, own, labels)
    return own


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
    single = torch.Size([1 if d in parts else n for d, n in enumerate(x.shape)])
    common = len(parts) == 1 and y.shape == single != x.shape  # one head of keys for many of queries
    y = y.expand_as(x) if common else y
    if [d for d in b.dims if d < len(out) - 2] != parts or len(parts) > 1 or x.numel() != y.numel():
        raise InputError(
            f"{node.name}: {node.operation} of units that do not lie alike; allowed: equal layouts"
        )
    units.tie(node.name, x, y)
    units.hints.append((x, ".query"))
    found = _heads(units, node, x, parts, out)
    units.common += [found.labels.flatten()[:1]] if common else []
    return found


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
