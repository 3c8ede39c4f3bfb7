"""The rules of what moves entries about, puts them side by side or pads them: labels go where their entries go."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph.axes import NONE, Units, Value, compact, join
from stages.core.graph.nodes import Node
from stages.core.graph.rules import Shapes, on_dim, place_parameter
from stages.core.runtime.errors import InputError


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
        dim = node.attributes["dim"] % len(inputs[0].shape)
        return {min(d - (d > dim), len(out) - 1) for d in ones}
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


def padded(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Beside units come entries of no unit; places beside others have the same units."""
    value, pad = inputs[0], list(node.attributes["pad"])
    if value.common and not value.dims and node.attributes.get("mode", "constant") == "constant":
        value = _features_of(units, value, pad, out)
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


def _features_of(units: Units, value: Value, pad: Sequence[int], out: torch.Size) -> Value:
    """What is of the input alone, as features where entries are put beside those (a first state of zeros)."""
    rank = len(out)
    over = [d for d in (1, rank - 1) if 2 * (rank - 1 - d) < len(pad) and out[d] != value.shape[d]]
    if len(over) != 1 or rank < 2:
        return value
    labels = units.new(value.shape[over[0]], "input")
    units.fixed.append(labels)
    return Value(on_dim(labels, over[0], value.shape).labels, (over[0],), value.shape, True)


def _parts_of(units: Units, node: Node, value: Value) -> Tensor:
    """A unit for each part of a value with units inside parts, as it broadcasts, for what is padded there."""
    dim = value.dims[0]
    rows = value.labels.movedim(dim, 0).flatten(1)
    outer = units.new(len(rows), f"{node.path}.parts")
    units.put_inside(node.name, rows, outer)
    return on_dim(outer, dim, value.shape).labels


moving = partial  # moving(moved, run=...) makes a rule
