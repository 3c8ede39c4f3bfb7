"""A network as a short list of named operations: what a trace gives, a sweep runs and a merged file stores.

Every operation is an entry of OPERATIONS with two parts: how it runs, and its rule, which says where the units of
its inputs are on its parameters and on its output. An operation that is not here cannot be traced.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.errors import InputError
from stages.core.spec import Axis, Span


@dataclass(frozen=True)
class Node:
    """One operation. ``parameters`` maps a role (weight, bias, ...) to a name in the state dict."""

    name: str
    operation: str
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether the node is a linear map that is fitted: Linear or Conv2d."""
        return self.operation in ("linear", "conv2d")


@dataclass(frozen=True)
class Graph:
    """Nodes in the order they run; the first is the input, the last one's value is the output."""

    nodes: tuple[Node, ...]

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def users(self) -> dict[str, list[Node]]:
        """For each node the nodes that read its value."""
        users: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return users

    def last_uses(self) -> dict[str, list[str]]:
        """For each node the values that nothing reads after it."""
        last: dict[str, str] = {}
        for node in self.nodes:
            for name in node.inputs:
                last[name] = node.name
        uses: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for name, user in last.items():
            uses[user].append(name)
        return uses


@dataclass(frozen=True)
class Segment:
    """``size`` units of a group side by side on a value's unit dimension, each ``block`` entries wide."""

    group: str
    size: int
    block: int = 1


@dataclass(frozen=True)
class Layout:
    """The dimension of a value that holds units, and the groups along it."""

    dim: int
    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        return sum(segment.size * segment.block for segment in self.segments)


class Groups:
    """The groups of a network while it is being traced: spans are recorded, then groups are tied (union-find)."""

    def __init__(self) -> None:
        self.parents: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.spans: dict[str, list[Span]] = {}

    def new(self, size: int, name: str) -> str:
        while name in self.parents:
            name += "'"
        self.parents[name] = name
        self.sizes[name] = size
        self.spans[name] = []
        return name

    def find(self, group: str) -> str:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def place(self, parameter: str, dim: int, layout: Layout) -> None:
        """Record that a parameter's dimension follows a layout."""
        start = 0
        for segment in layout.segments:
            self.spans[segment.group].append(Span(Axis(parameter, dim), start, segment.block))
            start += segment.size * segment.block

    def tie(self, node: str, first: Layout, second: Layout) -> None:
        """Two layouts that must be permuted together."""
        if first.dim != second.dim or [(s.size, s.block) for s in first.segments] != [
            (s.size, s.block) for s in second.segments
        ]:
            raise InputError(f"{node}: joins values whose units do not lie alike; allowed: equal layouts")
        for a, b in zip(first.segments, second.segments, strict=True):
            order = list(self.parents)  # the group that was there first gives its name
            first_root, second_root = sorted((self.find(a.group), self.find(b.group)), key=order.index)
            self.parents[second_root] = first_root


Run = Callable[[Sequence[Tensor], Mapping[str, Tensor], Mapping[str, Any]], Tensor]
Rule = Callable[[Groups, Node, Sequence[Layout], Sequence[torch.Size], torch.Size], Layout]


@dataclass(frozen=True)
class Operation:
    run: Run
    rule: Rule


def _same(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Any, out: Any) -> Layout:
    """Elementwise on one value."""
    return layouts[0]


def _joined(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Any, out: Any) -> Layout:
    """Elementwise on several values: their units must be permuted together."""
    for other in layouts[1:]:
        groups.tie(node.name, layouts[0], other)
    return layouts[0]


def _linear(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Any, out: torch.Size) -> Layout:
    unit_dim = 1 if node.operation == "conv2d" else len(out) - 1
    if layouts[0].dim != unit_dim:
        raise InputError(
            f"{node.name}: {node.operation} reads dimension {unit_dim}, its units lie on {layouts[0].dim}"
        )
    group = groups.new(out[unit_dim], node.parameters["weight"].rpartition(".")[0] or node.name)
    result = Layout(unit_dim, (Segment(group, out[unit_dim]),))
    groups.place(node.parameters["weight"], 1, layouts[0])
    for role in ("weight", "bias"):
        if role in node.parameters:
            groups.place(node.parameters[role], 0, result)
    return result


def _batch_norm(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Any, out: Any) -> Layout:
    if layouts[0].dim != 1:
        raise InputError(f"{node.name}: batch_norm reads dimension 1, its units lie on {layouts[0].dim}")
    for name in node.parameters.values():
        groups.place(name, 0, layouts[0])
    return layouts[0]


def _spatial(
    groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Sequence[torch.Size], out: Any
) -> Layout:
    """Pooling over the last two dimensions."""
    if layouts[0].dim >= len(shapes[0]) - 2:
        raise InputError(f"{node.name}: {node.operation} pools the dimension of the units")
    return layouts[0]


def _flatten(
    groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Sequence[torch.Size], out: Any
) -> Layout:
    if layouts[0].dim != 1:
        raise InputError(f"{node.name}: flatten from dimension 1, the units lie on {layouts[0].dim}")
    block = math.prod(shapes[0][2:])
    return Layout(1, tuple(Segment(s.group, s.size, s.block * block) for s in layouts[0].segments))


def _mean(
    groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Sequence[torch.Size], out: Any
) -> Layout:
    dims = [dim % len(shapes[0]) for dim in node.attributes["dims"]]
    unit_dim = layouts[0].dim
    if unit_dim in dims or 0 in dims:
        raise InputError(f"{node.name}: mean over the batch or the units; allowed: other dimensions")
    if not node.attributes["keepdim"]:
        unit_dim -= sum(dim < unit_dim for dim in dims)
    return Layout(unit_dim, layouts[0].segments)


def _concatenate(groups: Groups, node: Node, layouts: Sequence[Layout], shapes: Any, out: Any) -> Layout:
    dims = {layout.dim for layout in layouts}
    if dims != {node.attributes["dim"] % len(out)}:
        raise InputError(
            f"{node.name}: concatenates dimension {node.attributes['dim']}, not that of the units"
        )
    return Layout(dims.pop(), tuple(segment for layout in layouts for segment in layout.segments))


def _unary(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], **a), _same)


def _pool(function: Callable[..., Tensor]) -> Operation:
    return Operation(lambda x, p, a: function(x[0], **a), _spatial)


def _run_batch_norm(x: Sequence[Tensor], p: Mapping[str, Tensor], a: Mapping[str, Any]) -> Tensor:
    return F.batch_norm(
        x[0], p["running_mean"], p["running_var"], p.get("weight"), p.get("bias"), False, 0.0, **a
    )


def _sum(x: Sequence[Tensor], p: Any, a: Any) -> Tensor:
    return x[0] + x[1]


def _product(x: Sequence[Tensor], p: Any, a: Any) -> Tensor:
    return x[0] * x[1]


OPERATIONS: dict[str, Operation] = {
    "conv2d": Operation(lambda x, p, a: F.conv2d(x[0], p["weight"], p.get("bias"), **a), _linear),
    "linear": Operation(lambda x, p, a: F.linear(x[0], p["weight"], p.get("bias")), _linear),
    "batch_norm": Operation(_run_batch_norm, _batch_norm),
    "add": Operation(_sum, _joined),
    "multiply": Operation(_product, _joined),
    "concatenate": Operation(lambda x, p, a: torch.cat(list(x), a["dim"]), _concatenate),
    "flatten": Operation(lambda x, p, a: torch.flatten(x[0], 1), _flatten),
    "mean": Operation(lambda x, p, a: torch.mean(x[0], a["dims"], a["keepdim"]), _mean),
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


def node_parameters(node: Node, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A node's parameters by role, out of a state dict."""
    return {role: state[name] for role, name in node.parameters.items()}


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
