"""Products of units with units, inside parts: attention between channels (XCiT, EdgeNeXt, DaViT), linear attention.

Such a product (..., parts, d, d) has units on its rows, those of the left, and *beside* them other units on its
columns, those of the right. Both lie inside the same parts (heads), which are shared or separate as a whole. What is
elementwise, or a softmax, keeps both; a reduction over the columns leaves the rows (DANet); a second product sums over
one side, whose units are tied with what it meets, and leaves the other:

    (queries x keys) values: rows are left       queries (keys x values): columns are left
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.graph.axes import NONE, Units, Value
from stages.core.graph.nodes import REDUCTIONS, Node
from stages.core.runtime.errors import InputError


def crosses(a: Value, b: Value) -> bool:
    """Whether a product is one of units with units, or reads such a product."""
    last, before = len(b.shape) - 1, len(b.shape) - 2
    rows, columns = before in a.dims and last not in a.dims, last in b.dims and before not in b.dims
    return a.beside is not None or b.beside is not None or (rows and columns and len(a.shape) == len(b.shape))


def product(units: Units, node: Node, a: Value, b: Value, out: torch.Size) -> Value:
    """Of two values of equal rank: what is summed over is tied, or, where that has no units, both sides are kept."""
    last, before = len(out) - 1, len(out) - 2
    common = a.common and b.common
    if a.beside is not None and b.beside is None and before in b.dims and last not in b.dims:
        _tie(units, node, a.beside.transpose(-1, -2), b.labels)
        return Value(a.labels, a.dims, out, common)
    if b.beside is not None and a.beside is None and last in a.dims and before not in a.dims:
        _tie(units, node, a.labels.transpose(-1, -2), b.labels)
        return Value(b.beside, tuple(sorted({*b.dims, last} - {before})), out, common)
    parts = [[d for d in value.dims if d < before] for value in (a, b)]
    if a.beside is not None or b.beside is not None or parts[0] != parts[1] or len(parts[0]) != 1:
        raise InputError(
            f"{node.name}: {node.operation} of units with units that lie in no common parts; allowed: inside heads"
        )
    (dim,) = parts[0]
    rows = [value.labels.movedim(dim, 0).flatten(1) for value in (a, b)]
    outer = units.new(max(map(len, rows)), f"{node.name}.heads")
    whole = torch.cat([parts for _, parts, _ in units.inside]) if units.inside else outer[:0]
    for own in rows:
        own = own.expand(len(outer), -1)
        part = torch.isin(own, whole)  # what is padded is the part's
        units.tie(node.name, own[part], outer[:, None].expand_as(own)[part])
        units.put_inside(node.name, torch.where(part, NONE, own), outer)
    return Value(a.labels, a.dims, out, common, beside=b.labels)


def _tie(units: Units, node: Node, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"{node.name}: {node.operation} of units that do not lie alike; allowed: equal layouts"
        )
    units.tie(node.name, a, b)


def check_beside(node: Node, inputs: Sequence[Value], elementwise: bool) -> None:
    """Raises InputError for an operation that would lose the units on the columns of its inputs."""
    held = [value for value in inputs if value.beside is not None]
    if not held or node.operation in ("matmul", "attention") or _over_columns(node, held[0]):
        return
    others = {d for value in inputs if value.beside is None for d in value.dims}
    if len(held) > 1 or not (elementwise or node.operation == "softmax") or others - set(held[0].dims):
        raise InputError(
            f"{node.name}: {node.operation} of a product of units with units; allowed: what is elementwise, softmax, a "
            "reduction over its columns, or another product"
        )


def _over_columns(node: Node, value: Value) -> bool:
    """Whether a reduction is over all units on the columns of a product, and of nothing else."""
    rank = len(value.shape)
    return node.operation in REDUCTIONS and [d % rank for d in node.attributes["dims"]] == [rank - 1]


def kept_beside(node: Node, inputs: Sequence[Value], found: Value) -> Value:
    """What an operation gives, with the units on the columns of its inputs."""
    held = [value.beside for value in inputs if value.beside is not None]
    if not held or node.operation in ("matmul", "attention", *REDUCTIONS):
        return found
    return dataclasses.replace(found, beside=held[0])
