"""Running single nodes of a graph on zeros, to see what shape each value has."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.extent import most_entries, place_for
from stages.core.graph.nodes import Graph, Node, node_parameters
from stages.core.graph.operations import run_node
from stages.core.graph.spread import Spread
from stages.core.runtime.errors import InputError


@torch.no_grad()
def shapes_of(
    graph: Graph, parameters: Mapping[str, Sequence[int]], example: Sequence[int]
) -> dict[str, torch.Size]:
    """Of every value of one image."""
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in parameters.items()}
    run = Spread(
        graph, torch.zeros(tuple(example)), lambda node, x: try_node(node, x, state), lambda _: rules.same
    )
    return run.shapes


def try_node(node: Node, inputs: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
    """What a node gives. Raises InputError where it cannot run on values of these shapes."""
    try:
        own = node_parameters(node, state)
        place = place_for(most_entries(node, inputs, own))
        if place == "meta" or any(value.is_meta for value in inputs):
            inputs, own = [value.to("meta") for value in inputs], {k: v.to("meta") for k, v in own.items()}
        return run_node(node, inputs, own)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise InputError(
            f"{node.name}: {node.operation} cannot run on {shapes} ({str(error).splitlines()[0]}); "
            "allowed: an example of the shape that the network takes"
        ) from error
