"""Batch norms folded into the linear maps that they alone read."""

from collections.abc import Mapping

from torch import Tensor

from stages.core.graph.nodes import Graph, Node, node_parameters, oriented


def exclusive_norms(graph: Graph) -> dict[str, Node]:
    """{linear map: the batch norm that alone reads it}."""
    users, norms = graph.users(), {}
    for node in graph.nodes:
        readers = users[node.name]
        if node.fitted and len(readers) == 1 and readers[0].operation == "batch_norm":
            norms[node.name] = readers[0]
    return norms


def norm_scale(norm: Node, state: Mapping[str, Tensor]) -> Tensor:
    """What a batch norm multiplies each unit by: gamma / sigma."""
    p = node_parameters(norm, state)
    scale = (p["running_var"] + norm.attributes["eps"]).rsqrt()
    return scale * p["weight"] if "weight" in p else scale


def fold(state: dict[str, Tensor], node: Node, norm: Node) -> None:
    """Multiply a linear map by its batch norm's scale, which stays a batch norm of the same function."""
    scale = norm_scale(norm, state)
    weight = oriented(node, state[node.parameters["weight"]])
    scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    state[node.parameters["weight"]] = oriented(node, scaled)
    if "bias" in node.parameters:
        state[node.parameters["bias"]] = state[node.parameters["bias"]] * scale
    names = norm.parameters
    variance = state[names["weight"]].square()
    state[names["running_mean"]] = state[names["running_mean"]] * scale
    state[names["running_var"]] = variance
    state[names["weight"]] = (variance + norm.attributes["eps"]).sqrt()
