"""What of a merged network is a copy of a source, to be left alone by fitting and recalibration."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.merged.arrangement import Arrangement, pieces_of, unit_keys
from stages.core.merged.network import MergedNetwork
from stages.core.merged.unit_layers import NORMS, Moved, over_units


def exact_entries(network: MergedNetwork) -> dict[str, Tensor]:
    """For each value which entries are a copy of a source's: bool (merged width,) by node name.

    They are what the images alone or separate units that read only such entries lead to. Fitting and batch-norm
    recomputation leave them as they are, so that everything separate gives exactly the sources' features.
    """
    exact: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    for node in network.trace.graph.nodes:
        arrangement = network.arrangement(node.name)
        if node.operation == "input":
            exact[node.name] = torch.ones(arrangement.width, dtype=torch.bool)
        elif node.linear or node.operation == "embedding" or over_units(node, network.trace):
            read, inputs = exact[node.inputs[0]], network.arrangement(node.inputs[0])
            whole = torch.tensor([bool(read[p].all()) for p in inputs.positions])
            exact[node.name] = (arrangement.owner >= 0) & whole[arrangement.owner]
        elif node.grouped or (node.operation in NORMS and node.attributes.get("groups", 1) > 1):
            count = network.map_of(node).attributes["groups"]  # each part of the units alone
            whole = exact[node.inputs[0]].view(count, -1).all(1)
            exact[node.name] = (arrangement.owner >= 0) & whole.repeat_interleave(arrangement.width // count)
        elif node.operation == "along":
            read, exact[node.name] = exact[node.inputs[0]], arrangement.owner >= 0
            for piece in pieces_of(arrangement):
                exact[node.name][piece.start : piece.stop] &= read[piece.start : piece.stop].all()
        elif node.name in network.trace.moved:
            moved: Moved = network.map_of(node)
            every = torch.cat([exact[name] for name in node.inputs])
            exact[node.name] = every[moved.index_of.clamp(min=0)] | (moved.index_of < 0)
        else:
            exact[node.name] = _unit_by_unit(network, node, exact, arrangement, numbers)
            if node.parameters:
                exact[node.name] &= arrangement.owner >= 0
    return exact


def _unit_by_unit(
    network: MergedNetwork,
    node: Node,
    exact: Mapping[str, Tensor],
    arrangement: Arrangement,
    numbers: dict[str, int],
) -> Tensor:
    """A unit of a value is a copy where it is in all that the node reads."""
    if all(len(exact[name]) == arrangement.width for name in node.inputs) and len(node.inputs) == 1:
        return exact[node.inputs[0]].clone()
    if node.name in network.trace.graph.logits and network.labels == "separate":
        return torch.stack([exact[name] for name in node.inputs]).all(0)
    layouts, shared = network.trace.layouts, network.shared
    keys = unit_keys(layouts[node.name], shared, network.networks, numbers)
    found = torch.ones(arrangement.width, dtype=torch.bool)
    for name in node.inputs:
        own = unit_keys(layouts[name], shared, network.networks, numbers)
        spoiled = own[~exact[name]].unique()
        found &= ~torch.isin(keys, spoiled)
        if bool((spoiled == -1).any()):
            found[:] = False
    return found
