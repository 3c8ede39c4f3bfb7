"""The one table of operations a network may be made of: how each runs, its rule for units, what it costs.

An operation that is not here cannot be traced. Each runs on a merged network's values as on a source's: what depends
on the number of units is taken from the value. How an operation is added is in docs/adding.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph import apart, lines, mixing, moves, products, rules, windows
from stages.core.graph.nodes import (
    ADAPTIVE,
    CONVOLUTIONS,
    POOLS,
    REDUCTIONS,
    TRANSPOSED,
    Graph,
    Node,
    node_parameters,
)
from stages.core.runtime.errors import InputError

Inputs, Parameters, Attributes = Sequence[Tensor], Mapping[str, Tensor], Mapping[str, Any]
Run = Callable[[Inputs, Parameters, Attributes], Tensor]
MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Operation:
    """run: what it computes. rule: what it says about units. macs: multiply-accumulates for each entry of its output
    beside those of dense weights, from the shapes of its inputs and its attributes. moves: whether it only moves
    entries about."""

    run: Run
    rule: rules.Rule
    macs: Callable[[Sequence[torch.Size], Attributes], int] = lambda shapes, a: 0
    moves: bool = False


def _unary(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], **a), rules.same)


def _aten(name: str) -> Operation:
    """Elementwise, called as torch calls it."""
    return _unary(lambda x, name=name, **a: getattr(torch.ops.aten, name)(x, **a))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Operation, Operation]:
    """On two values, and on a value and a parameter, which comes first where ``reverse``."""

    def with_parameter(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
        value = p["value"].view(a["view"]) if "view" in a else p["value"]
        return function(value, x[0]) if a.get("reverse") else function(x[0], value)

    return Operation(lambda x, p, a: function(x[0], x[1]), rules.same), Operation(with_parameter, rules.same)


def _spatial(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], **a), rules.spatial)


def _moving(run: Run) -> Operation:
    return Operation(run, moves.moving(moves.moved, run=run), moves=True)


def _convolution(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], p["weight"], p.get("bias"), **a), rules.linear)


def _mix(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A linear map over a dimension that is not the one of the units."""
    y = F.linear(x[0].movedim(a["dim"], -1), p["weight"].flatten(1), p.get("bias"))
    return y.movedim(-1, a["dim"])


def _along(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A convolution that has the units among its positions. taps: multiply-accumulates for each entry of its output."""
    function = getattr(F, CONVOLUTIONS[len(a["stride"]) - 1])
    settings = {key: value for key, value in a.items() if key != "taps"}
    return function(x[0], p["weight"], p.get("bias"), **settings)


def _batch_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.batch_norm(
        x[0], p["running_mean"], p["running_var"], p.get("weight"), p.get("bias"), False, 0.0, **a
    )


def _batch_statistics(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.batch_norm(x[0], None, None, p.get("weight"), p.get("bias"), True, 0.0, **a)


def _layer_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    over = x[0].shape[-a.get("rank", 1) :]
    weight, bias = p.get("weight"), p.get("bias")
    if all(own is None or own.shape == over for own in (weight, bias)):
        return F.layer_norm(x[0], over, weight, bias, a["eps"])
    y = F.layer_norm(x[0], over, None, None, a["eps"])  # parameters as wide as units beside those it reduces
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.group_norm(x[0], a["groups"], p.get("weight"), p.get("bias"), a["eps"])


def _attention(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    mask = p.get("mask", x[3] if len(x) > 3 else None)
    return F.scaled_dot_product_attention(x[0], x[1], x[2], mask, **a)


def _rearrange(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """Every dimension cut into factors (atoms), these put in order, neighbours joined.

    free: for each dimension the factor whose extent is what the value gives (images, units).
    """
    sizes: list[int] = []
    for extent, atoms, free in zip(x[0].shape, a["atoms"], a["free"], strict=True):
        if free is None:
            if extent != math.prod(atoms):
                raise InputError(
                    f"input: gives {extent} entries where {math.prod(atoms)} are rearranged; allowed: inputs of the "
                    "size that was traced"
                )
            sizes += atoms
        else:
            others = math.prod(atoms[:free] + atoms[free + 1 :])
            sizes += [*atoms[:free], extent // others, *atoms[free + 1 :]]
    shape, at = [], 0
    for count in a["groups"]:
        shape.append(math.prod([sizes[i] for i in a["order"][at : at + count]]))
        at += count
    return x[0].reshape(sizes).permute(a["order"]).reshape(shape)


def _concatenate(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    if not p:
        return torch.cat(list(x), a["dim"])
    shape = list(x[0].shape)
    shape[a["dim"] % len(shape)] = p["value"].shape[a["dim"] % len(shape) - len(shape)]
    both = [p["value"].expand(shape), x[0]]
    return torch.cat(both if a["first"] else both[::-1], a["dim"])


def _constant(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """The same for each image. images: which of ``rank`` dimensions counts them. common, even: see rules."""
    if not 0 < a["rank"] <= MOST_DIMENSIONS:
        raise ValueError(f"a constant of {a['rank']} dimensions")
    return p["value"].expand([x[0].size(0) if d == a["images"] else -1 for d in range(a["rank"])])


def _select(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A copy: a view would hold on to all that was left behind."""
    return x[0].select(a["dim"], a["index"]).clone()


def _slice(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    every = [slice(None)] * (a["dim"] % x[0].dim())
    return x[0][(*every, slice(a["start"], a["stop"], a["step"]))].clone()


def _pick(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return x[0].index_select(a["dim"], torch.tensor(a["index"], device=x[0].device))


def _pad(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    if not x[0].is_floating_point():  # where units are: what is new has none
        return F.pad(x[0], a["pad"])
    return F.pad(x[0], a["pad"], a.get("mode", "constant"), a.get("value"))


def _expand(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return x[0].expand(a["sizes"])


def _softmax(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return torch.softmax(x[0], a["dim"])


def _log_softmax(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return torch.log_softmax(x[0], a["dim"])


def _neighbours(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """part: whether the channels of dimension 2 are looked at, those of each part of dimension 1 for themselves."""
    settings = {key: value for key, value in a.items() if key != "part"}
    if not a.get("part"):
        return F.local_response_norm(x[0], **settings)
    return F.local_response_norm(x[0].flatten(0, 1), **settings).reshape_as(x[0])


def unspread(attributes: Attributes) -> dict[str, Any]:
    """Those of a reduction that gives one entry for all units."""
    return {key: value for key, value in attributes.items() if key != "spread"}


def _reduction(function: Callable[..., Tensor]) -> Operation:
    """spread: the dimension of units along which what is reduced is repeated (stages.core.graph.spread)."""

    def run(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
        settings = {key: value for key, value in unspread(a).items() if key != "dims"}
        found = function(x[0], a["dims"], **settings)
        if "spread" not in a:
            return found
        return found.expand([n if d == a["spread"] else -1 for d, n in enumerate(x[0].shape)])

    return Operation(run, rules.reduced)


def _length(x: Tensor, dims: Sequence[int], keepdim: bool, order: float = 2) -> Tensor:
    return torch.linalg.vector_norm(x, order, dims, keepdim)


LONE = {  # reductions that torch does not have by these names, or over one dimension alone
    "length": _length,
    "prod": lambda x, dims, keepdim: x.prod(dims[0], keepdim),
    "median": lambda x, dims, keepdim: x.median(dims[0], keepdim).values,
    "kthvalue": lambda x, dims, keepdim, k: x.kthvalue(k, dims[0], keepdim).values,
}


def _compared(name: str) -> Callable[..., Tensor]:
    """A comparison as one and zero of the value's type, which can be kept and multiplied as any value."""
    return lambda x, value: getattr(torch, name)(x, value).to(x.dtype)


def _where(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """Of two values, or a value and a number (true, false): the first where the condition, given first, is not zero."""
    rest = iter(x[1:])
    chosen = [a[role] if role in a else next(rest) for role in ("true", "false")]
    found = torch.where(x[0] != 0, *chosen)
    return found if a.get("integers") else found.to(x[0].dtype)  # integers: what tokens decide


ROUNDING = ("remainder", "fmod", "floor_divide")
COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
BINARY = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "raise": torch.pow,
    "remainder": lambda x, value: torch.remainder(x, value),
    "fmod": lambda x, value: torch.fmod(x, value),
    "floor_divide": lambda x, value: torch.floor_divide(x, value),
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "copysign": torch.copysign,
    **{name: _compared(name) for name in COMPARISONS},
}
UNARY = (
    "relu", "relu6", "gelu", "silu", "leaky_relu", "elu", "hardswish", "hardsigmoid", "mish", "sigmoid", "tanh",
    "selu", "softplus", "hardtanh", "clamp", "clamp_min", "clamp_max", "exp", "log", "sqrt", "rsqrt", "square", "abs",
    "neg", "reciprocal", "erf", "sin", "cos", "log_sigmoid", "celu", "softshrink", "hardshrink", "threshold", "log1p",
    "expm1", "sign", "round", "floor", "ceil", "trunc", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh",
    "atanh", "erfc", "erfinv", "exp2", "log2", "log10", "nan_to_num", "digamma", "lgamma", "i0",
)  # fmt: skip

OPERATIONS: dict[str, Operation] = {
    **{name: _convolution(getattr(F, name)) for name in (*CONVOLUTIONS, *TRANSPOSED)},
    "linear": Operation(lambda x, p, a: F.linear(x[0], p["weight"], p.get("bias")), rules.linear),
    "mix": Operation(_mix, mixing.mixed, lambda shapes, a: shapes[0][a["dim"]]),
    "along": Operation(_along, mixing.along, lambda shapes, a: a["taps"]),
    "embedding": Operation(lambda x, p, a: F.embedding(x[0].long(), p["weight"]), rules.embedding),
    "batch_norm": Operation(_batch_norm, rules.channels),
    "batch_statistics": Operation(_batch_statistics, rules.channels),
    "prelu": Operation(lambda x, p, a: F.prelu(x[0], p["weight"]), rules.channels),
    "layer_norm": Operation(_layer_norm, rules.layer_norm),
    "group_norm": Operation(_group_norm, rules.group_norm),
    "normalize": Operation(lambda x, p, a: F.normalize(x[0], dim=a["dim"], eps=a["eps"]), rules.normalised),
    "attention": Operation(
        _attention, products.attention, lambda shapes, a: 2 * shapes[1][-2]
    ),
    "matmul": Operation(lambda x, p, a: torch.matmul(*x), products.matmul, lambda shapes, a: shapes[0][-1]),
    "matmul_parameter": Operation(
        lambda x, p, a: x[0] @ p["value"], apart.looked_up, lambda shapes, a: shapes[0][-1]
    ),
    "convolve_parameter": Operation(
        lambda x, p, a: apart.convolve(x[0], p["value"], a, *x[0].shape[1:3]),
        apart.convolved,
        lambda shapes, a: math.prod(a["view"][1:]),
    ),
    "softmax": Operation(_softmax, rules.softmax),
    "log_softmax": Operation(_log_softmax, rules.softmax),
    **{name: _binary(run)[0] for name, run in BINARY.items()},
    **{f"{name}_parameter": _binary(run)[1] for name, run in BINARY.items()},
    "shift": _unary(lambda x, value: x + value),
    "scale": _unary(lambda x, value: x * value),
    "divide_by": _unary(lambda x, value: x / value),
    "subtract_from": _unary(lambda x, value: value - x),
    "power": _unary(lambda x, value: x**value),
    "power_of": _unary(lambda x, value: value**x),
    **{f"{name}_number": _unary(BINARY[name]) for name in (*COMPARISONS, *ROUNDING)},
    "where": Operation(_where, rules.same),
    "fill_parameter": Operation(  # value: one where it is filled with a number, zero elsewhere
        lambda x, p, a: torch.where(p["value"] != 0, a["fill"], x[0]), rules.same
    ),
    "concatenate": Operation(_concatenate, moves.concatenated, moves=True),
    "concatenate_parameter": Operation(_concatenate, moves.concatenated),
    "constant_parameter": Operation(_constant, moves.constant),
    "rearrange": _moving(_rearrange),
    "select": _moving(_select),
    "slice": _moving(_slice),
    "pick": _moving(_pick),
    "pad": Operation(_pad, moves.padded, moves=True),
    "roll": _moving(lambda x, p, a: x[0].roll(a["shifts"], a["dims"])),
    "flip": _moving(lambda x, p, a: x[0].flip(a["dims"])),
    "expand": _moving(_expand),
    **{name: _reduction(getattr(torch, name)) for name in REDUCTIONS if name not in LONE},
    **{name: _reduction(run) for name, run in LONE.items()},
    **{name: Operation(run, lines.along) for name, run in lines.RUNS.items()},
    "grid_sample": Operation(lines.sample, lines.sampled),
    "affine_grid": Operation(lines.grid, lines.coordinates),
    "local_response_norm": Operation(_neighbours, rules.neighbours),
    **{name: _spatial(getattr(F, name)) for name in (*POOLS, *ADAPTIVE)},
    "interpolate": _spatial(F.interpolate),
    "unfold": Operation(lambda x, p, a: F.unfold(x[0], **a), windows.unfolded),
    "fold": Operation(lambda x, p, a: F.fold(x[0], **a), windows.folded),
    **{name: _aten(name) for name in UNARY},
}  # fmt: skip


def run_node(node: Node, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Run one operation. ``parameters`` maps roles to tensors."""
    return OPERATIONS[node.operation].run(inputs, parameters, node.attributes)


def run_graph(graph: Graph, state: Mapping[str, Tensor], x: Tensor, stop: Node | None = None) -> Tensor:
    """The network's output for a batch, in evaluation mode, or what the node ``stop`` reads first."""
    values = {graph.nodes[0].name: x}
    last = graph.last_uses()
    for node in graph.nodes[1:]:
        if node is stop:
            return values[node.inputs[0]]
        values[node.name] = run_node(
            node, [values[name] for name in node.inputs], node_parameters(node, state)
        )
        for name in last[node.name]:
            del values[name]
    return values[graph.output.name]
