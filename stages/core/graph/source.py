"""A network that is to be merged, as a graph and its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stages.core.graph.nodes import Graph, Node, node_parameters
from stages.core.graph.operations import run_graph, run_node
from stages.core.graph.places import PlaceOf, nowhere
from stages.core.graph.trace import Trace, lay_out
from stages.core.units.groups import State


@dataclass(frozen=True)
class Task:
    """A source network's job: its name and the names of its classes."""

    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """One of the networks to be merged, as a trace and its tensors (units already in merged order)."""

    trace: Trace
    state: State
    task: Task
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.trace.graph

    def run_node(self, node: Node, inputs: Sequence[Tensor], task: int | None = None) -> Tensor:
        """One operation of the source network, the same for every task."""
        return run_node(node, inputs, node_parameters(node, self.state))

    def features(self, x: Tensor) -> Tensor:
        """What the head reads, or the last operation where there is none."""
        return run_graph(self.graph, self.state, x, self.graph.head or self.graph.output)

    def logits(self, features: Tensor) -> Tensor:
        """The source's output from what ``features`` gives."""
        value = features
        for node in (self.graph.head or self.graph.output, *self.graph.tail):
            value = self.run_node(node, [value])
        return value

    def __call__(self, x: Tensor) -> Tensor:
        """The source's own logits."""
        return run_graph(self.graph, self.state, x)


def trace_among(
    sources: Sequence[Source],
    graph: Graph,
    parameters: Mapping[str, tuple[int, ...]],
    example: Sequence[int],
    place_of: PlaceOf = nowhere,
) -> Trace:
    """The trace of one of ``sources`` of the same graph and tensors, or one that is made: as ``lay_out``."""
    found = (s.trace for s in sources if s.trace.graph == graph and s.trace.parameters == parameters)
    return next(found, None) or lay_out(graph, parameters, example, place_of)
