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

from stages.core.graph import apart, fourier, lines, mixing, moves, products, rules, runs, windows
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
from stages.core.graph.runs import Attributes, Inputs, Parameters

Run = Callable[[Inputs, Parameters, Attributes], Tensor]


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
    "hypot": runs.hypot,
    "copysign": torch.copysign,
    **{name: runs.compared(name) for name in COMPARISONS},
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
    "mix": Operation(runs.mix, mixing.mixed, lambda shapes, a: shapes[0][a["dim"]]),
    "along": Operation(runs.along, mixing.along, lambda shapes, a: a["taps"]),
    "embedding": Operation(lambda x, p, a: F.embedding(x[0].long(), p["weight"]), rules.embedding),
    "batch_norm": Operation(runs.batch_norm, rules.channels),
    "norm_parameter": Operation(runs.norm_parameter, rules.same),
    "batch_statistics": Operation(runs.batch_statistics, rules.channels),
    "prelu": Operation(lambda x, p, a: F.prelu(x[0], p["weight"]), rules.channels),
    "layer_norm": Operation(runs.layer_norm, rules.layer_norm),
    "group_norm": Operation(runs.group_norm, rules.group_norm),
    "normalize": Operation(lambda x, p, a: F.normalize(x[0], dim=a["dim"], eps=a["eps"]), rules.normalised),
    "attention": Operation(
        runs.attention, products.attention, lambda shapes, a: 2 * shapes[1][-2]
    ),
    "matmul": Operation(lambda x, p, a: torch.matmul(*x), products.matmul, lambda shapes, a: shapes[0][-1]),
    "matmul_parameter": Operation(
        lambda x, p, a: x[0] @ (p["value"].mT if a.get("turned") else p["value"]),
        apart.looked_up,
        lambda shapes, a: shapes[0][-1],
    ),
    "convolve_parameter": Operation(
        lambda x, p, a: apart.convolve(x[0], p["value"], a, *x[0].shape[1:3]),
        apart.convolved,
        lambda shapes, a: math.prod(a["view"][1:]),
    ),
    "softmax": Operation(runs.softmax, rules.softmax),
    "log_softmax": Operation(runs.log_softmax, rules.softmax),
    **{name: _binary(run)[0] for name, run in BINARY.items()},
    **{f"{name}_parameter": _binary(run)[1] for name, run in BINARY.items()},
    "shift": _unary(lambda x, value: x + value),
    "scale": _unary(lambda x, value: x * value),
    "divide_by": _unary(lambda x, value: x / value),
    "subtract_from": _unary(lambda x, value: value - x),
    "power": _unary(lambda x, value: x**value),
    "power_of": _unary(lambda x, value: value**x),
    **{f"{name}_number": _unary(BINARY[name]) for name in (*COMPARISONS, *ROUNDING)},
    "where": Operation(runs.where, rules.same),
    "fill_parameter": Operation(  # value: one where it is filled with a number, zero elsewhere
        lambda x, p, a: torch.where(p["value"] != 0, a["fill"], x[0]), rules.same
    ),
    "concatenate": Operation(runs.concatenate, moves.concatenated, moves=True),
    "concatenate_parameter": Operation(runs.concatenate, moves.concatenated),
    "constant_parameter": Operation(runs.constant, moves.constant),
    "rearrange": _moving(runs.rearrange),
    "select": _moving(runs.select),
    "slice": _moving(runs.sliced),
    "pick": _moving(runs.pick),
    "pad": Operation(runs.pad, moves.padded, moves=True),
    "roll": _moving(lambda x, p, a: x[0].roll(a["shifts"], a["dims"])),
    "flip": _moving(lambda x, p, a: x[0].flip(a["dims"])),
    "expand": _moving(runs.expand),
    **{name: _reduction(getattr(torch, name)) for name in REDUCTIONS if name not in runs.LONE},
    **{name: _reduction(run) for name, run in runs.LONE.items()},
    **{name: Operation(run, lines.along) for name, run in lines.RUNS.items()},
    "fourier": Operation(fourier.transform, fourier.transformed),
    "grid_sample": Operation(lines.sample, lines.sampled),
    "affine_grid": Operation(lines.grid, lines.coordinates),
    "local_response_norm": Operation(runs.neighbours, rules.neighbours),
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
