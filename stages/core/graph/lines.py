"""What looks along places: running sums, sorting, picking by rank, triangles of matrices, sampling of maps.

None of it looks across units: each has its own order of places.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph.axes import NONE, Units, Value, join
from stages.core.graph.nodes import Node
from stages.core.runtime.errors import InputError

Attributes = Mapping[str, Any]


def along(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Any) -> Value:
    """Entries of dimensions without units, in another order, chosen, or added up; by places of their own (gather)."""
    value, rank = inputs[0], len(inputs[0].shape)
    over = [node.attributes["dim"] % rank] if "dim" in node.attributes else [rank - 2, rank - 1]
    held = {d for own in inputs for d in own.dims if not own.common}
    if held & set(over):
        raise InputError(f"{node.name}: {node.operation} along the units; allowed: other dimensions")
    wide = [d for own in inputs[1:] if own.common for d in value.dims if own.shape[d] > 1]
    if node.operation == "gather" and wide and not value.common:
        raise InputError(
            f"{node.name}: {node.operation} by a constant for each unit; allowed: one for all of them"
        )
    if value.common:
        return Value(torch.full([1] * rank, NONE), (), out, all(own.common for own in inputs))
    found = Value(value.labels, value.dims, out)
    for other in inputs[1:]:
        seen = other.shape if other.common else out  # a constant of one entry is for all units
        found = join(units, node.name, found, Value(other.labels, other.dims, seen, other.common), out)
    return found


def sampled(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Any) -> Value:
    """A map at places that are computed: these are coordinates, and so in an order that is fixed."""
    value, grid = inputs
    if any(d > 1 for d in value.dims):
        raise InputError(f"{node.name}: samples dimension {value.dims[-1]}, which holds units")
    units.fixed += [grid.labels] if grid.dims else []
    return Value(value.labels, value.dims, out, value.common and grid.common)


def coordinates(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Any) -> Value:
    """Of places, by matrices whose entries are in an order that is fixed."""
    units.fixed += [inputs[0].labels] if inputs[0].dims else []
    return Value(torch.full([1] * len(out), NONE), (), out, inputs[0].common)


def _of_one(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, p, a: run(x[0], **a)


def gathered(x: Sequence[Tensor], p: Any, a: Attributes) -> Tensor:
    """wide: whether the index is one for all entries of each dimension, of a constant."""
    index = x[1].long()
    if "wide" in a:
        index = index.expand([x[0].size(d) if wide else -1 for d, wide in enumerate(a["wide"])])
    return x[0].gather(a["dim"], index)


def scattered(x: Sequence[Tensor], p: Any, a: Attributes) -> Tensor:
    """x: what is written, unless it is the number ``value``, and where. fill: what is elsewhere."""
    written, index = (a["value"], x[0]) if "value" in a else (x[0], x[1])
    one = torch.full_like(index.narrow(a["dim"], 0, 1), a["fill"])
    wide = F.pad(one, [0, 0] * (-1 - a["dim"]) + [0, a["size"] - 1], value=a["fill"])
    return wide.scatter(a["dim"], index.long(), written)


RUNS: dict[str, Callable[[Sequence[Tensor], Any, Attributes], Tensor]] = {
    "cumsum": _of_one(torch.cumsum),
    "cumprod": _of_one(torch.cumprod),
    "logcumsumexp": _of_one(torch.logcumsumexp),
    "cummax": _of_one(lambda x, dim: x.cummax(dim).values),
    "cummin": _of_one(lambda x, dim: x.cummin(dim).values),
    # as topk, which ONNX has: of equal values all orders are the same
    "sort": _of_one(lambda x, dim=-1, descending=False, **a: x.topk(x.shape[dim], dim, descending).values),
    "argsort": _of_one(lambda x, **a: x.sort(**a).indices.to(x.dtype)),
    "topk": _of_one(lambda x, **a: x.topk(**a).values),
    "topk_index": _of_one(lambda x, **a: x.topk(**a).indices.to(x.dtype)),
    "tril": _of_one(torch.tril),
    "triu": _of_one(torch.triu),
    "gather": gathered,
    "scatter": scattered,
}
"""By name of the operation; places are numbers of the value's type, as whatever is kept."""


def sample(x: Sequence[Tensor], p: Any, a: Attributes) -> Tensor:
    """x: a map (n, c, ...) and where to look at it, (n, ..., 2 or 3)."""
    return F.grid_sample(x[0], x[1], **a)


def grid(x: Sequence[Tensor], p: Any, a: Attributes) -> Tensor:
    """x: a matrix for each image. size: of a map without its images."""
    return F.affine_grid(x[0], [x[0].size(0), *a["size"]], align_corners=a["align_corners"])
