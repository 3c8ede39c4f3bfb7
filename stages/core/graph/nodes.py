"""A network as a short list of named operations: what a trace gives, a sweep runs and a merged file stores.

How each operation runs and where it keeps units is in stages.core.graph.operations and stages.core.graph.rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


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
        """Whether every output of the node reads every input channel: Linear, or Conv2d with one group."""
        return self.fitted and not self.grouped

    @property
    def grouped(self) -> bool:
        """Whether it is a convolution whose outputs read a part of the input channels each."""
        return self.attributes.get("groups", 1) > 1 and self.operation == "conv2d"

    @property
    def fitted(self) -> bool:
        """Whether the node is a linear map, which is fitted by least squares."""
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


def node_parameters(node: Node, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A node's parameters by role, out of a state dict."""
    return {role: state[name] for role, name in node.parameters.items()}


def graph_to_json(graph: Graph) -> list[dict[str, Any]]:
    """A graph as lists, texts and numbers, one mapping a node."""
    return [asdict(node) for node in graph.nodes]


def graph_from_json(nodes: Sequence[Mapping[str, Any]]) -> Graph:
    """The graph that ``graph_to_json`` wrote."""
    return Graph(tuple(Node(**{**node, "inputs": tuple(node["inputs"])}) for node in nodes))
