"""A graph at one input size: what shape each value has, where its units lie, and the groups that follow.

Nothing is guessed: an operation without a rule is an error that names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph.layouts import Groups, Layout, Segment
from stages.core.graph.nodes import Graph, Node, node_parameters
from stages.core.graph.operations import OPERATIONS, hidden_macs, run_node
from stages.core.graph.rules import parameter_dim
from stages.core.runtime.errors import InputError
from stages.core.units.groups import PermutationSpec


@dataclass(frozen=True)
class Trace:
    """What is known of an architecture at one input size.

    layouts and shapes are by node name; shapes are those of one image, (1, ...). parameters: the shape of each
    tensor of the state dict.
    """

    graph: Graph
    spec: PermutationSpec
    layouts: Mapping[str, Layout]
    shapes: Mapping[str, torch.Size]
    parameters: Mapping[str, tuple[int, ...]]

    def positions(self, node: Node) -> int:
        """How often a linear map is applied to one image: its multiply-accumulates are positions * weights."""
        return self.shapes[node.name].numel() // self.layouts[node.name].width

    def hidden_macs(self, node: Node) -> int:
        """Multiply-accumulates of a node without weights (attention) per entry of its output's units."""
        return hidden_macs(node, self.shapes[node.name])

    def unit_dim(self, node: Node, role: str) -> int:
        """Which dimension of a node's parameter lies on the units of its output."""
        if role != "value" or "view" in node.attributes:
            return 0
        return parameter_dim(node, self.layouts[node.inputs[0]], self.shapes[node.inputs[0]])


@torch.no_grad()
def lay_out(graph: Graph, parameters: Mapping[str, Sequence[int]], example: Sequence[int]) -> Trace:
    """Apply every operation's rule, in order.

    parameters: the shape of each tensor of the state dict. example: the shape of one image, (1, ...).
    """
    # One zero seen as every parameter: real kernels say each value's shape, and nothing is allocated for weights.
    # (Tensors on the meta device would do too, but their first use imports a second's worth of compiler.)
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in parameters.items()}
    groups, last = Groups(), graph.last_uses()
    first = graph.nodes[0].name
    images = groups.new(example[1], "input")
    values = {first: torch.zeros(tuple(example))}
    shapes = {first: values[first].shape}
    layouts = {first: Layout(1, (Segment(images, example[1]),))}
    for node in graph.nodes[1:]:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = out = _try_node(node, inputs, state)
        shapes[node.name] = out.shape
        rule = OPERATIONS[node.operation].rule
        read = [layouts[name] for name in node.inputs]
        layouts[node.name] = rule(groups, node, read, [value.shape for value in inputs], out.shape)
        for name in last[node.name]:
            del values[name]
    return Trace(
        graph,
        groups.spec(layouts[first], layouts[graph.output.name]),
        {name: groups.resolve(layout) for name, layout in layouts.items()},
        shapes,
        {name: tuple(shape) for name, shape in parameters.items()},
    )


def _try_node(node: Node, inputs: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
    try:
        return run_node(node, inputs, node_parameters(node, state))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise InputError(
            f"{node.name}: {node.operation} cannot run on {shapes} ({str(error).splitlines()[0]}); "
            "allowed: an example of the shape that the network takes"
        ) from error
