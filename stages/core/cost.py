"""What a merged network costs, counted two ways: from the split alone, and from the network that was built.

A linear map with merged input parts i and output parts o has k_o rows that read all k_i + N s_i inputs and N s_o
rows that read d_i. The heads of separate label spaces are outside the budget: they are there at any size.
"""

from collections.abc import Mapping

from stages.core.blocks import BlockMap, parts_of
from stages.core.errors import InputError
from stages.core.graph import Node
from stages.core.network import MergedNetwork
from stages.core.spec import State
from stages.core.trace import Trace

KINDS = ("macs", "parameters")


def counted_nodes(trace: Trace, labels: str) -> list[Node]:
    """The nodes with parameters that count towards the budget."""
    return [
        n
        for n in trace.graph.nodes
        if n.parameters and not (labels == "separate" and n is trace.graph.output)
    ]


def source_cost(trace: Trace, state: State, labels: str, kind: str) -> int:
    """Multiply-accumulates per image (of linear maps), or trained parameters, of one source network."""
    total = 0
    for node in counted_nodes(trace, labels):
        if kind == "macs":
            total += trace.positions(node) * state[node.parameters["weight"]].numel() if node.linear else 0
        else:
            total += sum(state[node.parameters[role]].numel() for role in _trained(node))
    return total


def split_cost(
    trace: Trace, state: State, labels: str, kind: str, shared: Mapping[str, int], networks: int
) -> int:
    """The same for a merged network with k ``shared`` units in each group, by formula."""
    total = 0
    for node in counted_nodes(trace, labels):
        outputs = parts_of(trace.layouts[node.name], shared, networks)
        if node.linear:
            weight = state[node.parameters["weight"]]
            taps = weight[0, 0].numel() if weight.dim() > 2 else 1
            inputs = parts_of(trace.layouts[node.inputs[0]], shared, networks)
            k = int((outputs.owner < 0).sum())
            weights = (k * inputs.width + (outputs.width - k) * weight.shape[1]) * taps
            total += weights * (trace.positions(node) if kind == "macs" else 1)
            if kind == "parameters" and "bias" in node.parameters:
                total += outputs.width
        elif kind == "parameters":
            total += len(_trained(node)) * outputs.width
    return total


def built_cost(network: MergedNetwork, kind: str, heads: bool = False) -> int:
    """The same, counted on the blocks of the network that was built. heads: count those of separate label spaces."""
    total = 0
    for node in counted_nodes(network.trace, "shared" if heads else network.labels):
        module = network.map_of(node)
        if kind == "parameters":
            total += sum(parameter.numel() for parameter in module.parameters())
        elif isinstance(module, BlockMap):
            total += network.trace.positions(node) * sum(weight.numel() for weight in module.weights)
    return total


def check_built(network: MergedNetwork, kind: str, promised: int) -> None:
    """Gate: the built network's counted cost is what allocation said."""
    found = built_cost(network, kind)
    if found != promised:
        raise InputError(f"the built network has {found} {kind}, allocation said {promised}")


def _trained(node: Node) -> list[str]:
    return [role for role in ("weight", "bias") if role in node.parameters]
