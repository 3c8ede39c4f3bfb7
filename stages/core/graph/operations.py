"""The operations a network may be made of: how each runs, and its rule (stages.core.graph.rules).

An operation that is not here cannot be traced. Each runs on a merged network's values as on a source's: what depends
on the number of units is taken from the value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.nodes import Graph, Node, node_parameters

Inputs, Parameters, Attributes = Sequence[Tensor], Mapping[str, Tensor], Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    run: Callable[[Inputs, Parameters, Attributes], Tensor]
    rule: rules.Rule


def _unary(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], **a), rules.same)


def _pool(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], **a), rules.spatial)


def _conv2d(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.conv2d(x[0], p["weight"], p.get("bias"), **a)


def _linear(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.linear(x[0], p["weight"], p.get("bias"))


def _batch_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.batch_norm(
        x[0], p["running_mean"], p["running_var"], p.get("weight"), p.get("bias"), False, 0.0, **a
    )


def _layer_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.layer_norm(x[0], x[0].shape[-1:], p.get("weight"), p.get("bias"), a["eps"])


def _group_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.group_norm(x[0], a["groups"], p.get("weight"), p.get("bias"), a["eps"])


def _attention(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """x[0]: (n, tokens, 3 * width), queries, keys and values side by side. Returns (n, tokens, width)."""
    n, tokens, width = x[0].shape
    heads = x[0].view(n, tokens, 3, width // (3 * a["head_dim"]), a["head_dim"]).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(n, tokens, width // 3)


def _add_parameter(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return x[0] + _seen(p["value"], a)


def _multiply_parameter(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return x[0] * _seen(p["value"], a)


def _seen(value: Tensor, a: Attributes) -> Tensor:
    return value.view(a["view"]) if "view" in a else value


def _concatenate_parameter(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    both = [p["value"].expand(len(x[0]), *p["value"].shape[1:]), x[0]]
    return torch.cat(both if a["first"] else both[::-1], a["dim"])


def _select(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A copy: a view would hold on to all that was left behind."""
    if "index" in a:
        return x[0].select(a["dim"], a["index"]).clone()
    every = [slice(None)] * a["dim"]
    return x[0][(*every, slice(*a["range"]))].clone()


OPERATIONS: dict[str, Operation] = {
    "conv2d": Operation(_conv2d, rules.linear),
    "linear": Operation(_linear, rules.linear),
    "batch_norm": Operation(_batch_norm, rules.batch_norm),
    "layer_norm": Operation(_layer_norm, rules.layer_norm),
    "group_norm": Operation(_group_norm, rules.group_norm),
    "attention": Operation(_attention, rules.attention),
    "add_parameter": Operation(_add_parameter, rules.with_parameter),
    "multiply_parameter": Operation(_multiply_parameter, rules.with_parameter),
    "concatenate_parameter": Operation(_concatenate_parameter, rules.with_parameter),
    "add": Operation(lambda x, p, a: x[0] + x[1], rules.joined),
    "multiply": Operation(lambda x, p, a: x[0] * x[1], rules.joined),
    "concatenate": Operation(lambda x, p, a: torch.cat(list(x), a["dim"]), rules.concatenate),
    "flatten": Operation(
        lambda x, p, a: torch.flatten(x[0], a.get("start", 1), a.get("end", -1)), rules.flatten
    ),
    "mean": Operation(lambda x, p, a: torch.mean(x[0], a["dims"], a["keepdim"]), rules.mean),
    "permute": Operation(lambda x, p, a: x[0].permute(a["dims"]), rules.transpose),
    "select": Operation(_select, rules.select),
    "max_pool2d": _pool(F.max_pool2d),
    "avg_pool2d": _pool(F.avg_pool2d),
    "adaptive_avg_pool2d": _pool(F.adaptive_avg_pool2d),
    "adaptive_max_pool2d": _pool(F.adaptive_max_pool2d),
    "shift": _unary(lambda x, value: x + value),
    "scale": _unary(lambda x, value: x * value),
    **{
        name: _unary(getattr(F, name))
        for name in ("relu", "relu6", "gelu", "silu", "leaky_relu", "elu", "hardswish", "hardsigmoid", "mish")
    },
    "sigmoid": _unary(torch.sigmoid),
    "tanh": _unary(torch.tanh),
}


def run_node(node: Node, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Run one operation. ``parameters`` maps roles to tensors."""
    return OPERATIONS[node.operation].run(inputs, parameters, node.attributes)


def run_graph(graph: Graph, state: Mapping[str, Tensor], x: Tensor, before_output: bool = False) -> Tensor:
    """The network's output for a batch, in evaluation mode, or what its last operation reads first."""
    values = {graph.nodes[0].name: x}
    last = graph.last_uses()
    for node in graph.nodes[1:]:
        if before_output and node is graph.output:
            return values[node.inputs[0]]
        values[node.name] = run_node(
            node, [values[name] for name in node.inputs], node_parameters(node, state)
        )
        for name in last[node.name]:
            del values[name]
    return values[graph.output.name]


def hidden_macs(node: Node, shape: Sequence[int]) -> int:
    """Multiply-accumulates per entry of the output's units of a map without weights: attention, which reads every
    token twice, for the scores and for the values. shape: of the node's output for one image."""
    return 2 * shape[1] * shape[1] if node.operation == "attention" else 0
