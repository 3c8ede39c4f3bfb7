"""What a merged network costs, counted two ways: from the split alone, and from the network that was built.

A linear map with merged inputs i and outputs o has k_o rows that read all k_i + N s_i inputs and N s_o
rows that read d_i; in a dense network all rows read all inputs. What acts on each unit alone (norms, grouped
convolutions, attention, maps over positions) costs the same per entry of the merged output as of the source's; the
weights of a map over positions are there once for each owner of units. The heads of separate label spaces are outside
the budget: they are there at any size.
"""

from collections.abc import Mapping

from stages.core.graph.nodes import COPIED, Node, oriented
from stages.core.graph.trace import Trace
from stages.core.merged.arrangement import arrange
from stages.core.merged.mixed import copies_of
from stages.core.merged.network import MergedNetwork
from stages.core.units.groups import State


def counted_nodes(trace: Trace, labels: str) -> list[Node]:
    """The nodes that count towards the budget."""
    outside = trace.graph.logits if labels == "separate" else set()
    return [n for n in trace.graph.nodes if (n.parameters or trace.hidden_macs(n)) and n.name not in outside]


def entry_cost(trace: Trace, state: State, node: Node, kind: str) -> int:
    """What one entry of a node's output costs beside the weight of a dense linear map, the same in every merge.

    macs: of grouped convolutions and attention. parameters: biases, norms, grouped weights, lone parameters.
    """
    if kind == "macs" and not node.grouped:
        return trace.hidden_macs(node)
    if node.operation in COPIED:
        return 0  # its parameters are copied as a whole: ``copied``
    roles = ["weight"] if kind == "macs" else _alone(node)
    whole = [trace.widened(node, role, state[node.parameters[role]]) for role in roles]
    entries = sum(tensor.numel() for tensor in whole) // trace.layouts[node.name].width
    return entries * (trace.positions(node) if kind == "macs" else 1)


def copied(trace: Trace, state: State, node: Node, kind: str) -> int:
    """What each copy of a linear map beside units costs, of which every owner of units has one."""
    if node.operation not in COPIED or kind == "macs":
        return 0
    return sum(state[name].numel() for name in node.parameters.values())


def _alone(node: Node) -> list[str]:
    """Roles of the trained parameters that have entries of their own for each unit of the output."""
    roles = ("bias",) if node.linear else ("weight", "bias", "value", "mask")
    return [role for role in roles if role in node.parameters]


def relative(cost: int, one: int) -> float:
    """To one source network; 1 where nothing of it counts (tables and heads alone)."""
    return cost / one if one else 1.0


def source_cost(trace: Trace, state: State, labels: str, kind: str) -> int:
    """Multiply-accumulates per image (of linear maps and attention), or trained parameters, of one source network."""
    total = 0
    for node in counted_nodes(trace, labels):
        if node.linear:
            times = trace.positions(node) if kind == "macs" else 1
            total += times * state[node.parameters["weight"]].numel()
        total += entry_cost(trace, state, node, kind) * trace.layouts[node.name].width
        total += copied(trace, state, node, kind)
    return total


def split_cost(
    trace: Trace,
    state: State,
    labels: str,
    kind: str,
    shared: Mapping[str, int],
    networks: int,
    dense: bool = False,
) -> int:
    """The same for a merged network with k ``shared`` units in each group, by formula."""
    total = 0
    for node in counted_nodes(trace, labels):
        outputs = arrange(trace.layouts[node.name], shared, networks)
        if node.linear:
            weight = oriented(node, state[node.parameters["weight"]])
            taps = weight[0, 0].numel() if weight.dim() > 2 else 1
            inputs = arrange(trace.layouts[node.inputs[0]], shared, networks)
            k = outputs.width if dense else int((outputs.owner < 0).sum())
            weights = (k * inputs.width + (outputs.width - k) * weight.shape[1]) * taps
            total += weights * (trace.positions(node) if kind == "macs" else 1)
        total += entry_cost(trace, state, node, kind) * outputs.width
        total += copied(trace, state, node, kind) * len(copies_of(outputs))
    return total


def built_cost(network: MergedNetwork, kind: str, heads: bool = False, executed: bool = False) -> int:
    """The same, counted on the blocks of the network that was built. heads: count those of separate label spaces.

    executed: multiply-accumulates as they are run, with the zeros of layers that run at once, or of all.
    """
    total, dense = 0, network.instead is not None and network.instead.dense
    for node in counted_nodes(network.trace, "shared" if heads else network.labels):
        if kind == "parameters":
            module = network.map_of(node) if node.parameters else None
            total += sum(p.numel() for p in module.parameters()) if module is not None else 0
        elif node.linear or node.grouped:
            module = network.map_of(node)
            whole = executed and node.linear and (module.at_once or dense)
            weights = [module.dense_weight()] if whole else module.weights
            total += network.trace.positions(node) * sum(weight.numel() for weight in weights)
        else:
            total += network.trace.hidden_macs(node) * network.arrangement(node.name).width
    return total


def check_built(network: MergedNetwork, kind: str, promised: int) -> None:
    """Gate: the built network's counted cost is what allocation said."""
    found = built_cost(network, kind)
    if found != promised:
        raise AssertionError(f"the built network has {found} {kind}, allocation said {promised}")
