"""What of a merged network is a copy of a source, to be left alone by fitting and recalibration."""

import torch
from torch import Tensor

from stages.core.merged.network import MergedNetwork
from stages.core.merged.unit_layers import NORMS


def exact_entries(network: MergedNetwork) -> dict[str, Tensor]:
    """For each value which entries are a copy of a source's: bool (merged width,) by node name.

    They are what the images alone or separate units that read only such entries lead to. Fitting and batch-norm
    recomputation leave them as they are, so that everything separate gives exactly the sources' features.
    """
    exact: dict[str, Tensor] = {}
    for node in network.trace.graph.nodes:
        arrangement = network.arrangement(node.name)
        if node.operation == "input":
            exact[node.name] = torch.ones(arrangement.width, dtype=torch.bool)
        elif node.linear or (node.operation in NORMS and node.attributes.get("groups", 1) == 1):
            read = exact[node.inputs[0]]
            inputs = network.arrangement(node.inputs[0])
            whole = torch.tensor([bool(read[p].all()) for p in inputs.positions])
            exact[node.name] = (arrangement.owner >= 0) & whole[arrangement.owner]
        elif node.grouped or node.operation in NORMS:  # each part of the units alone
            count = network.map_of(node).attributes["groups"]
            whole = exact[node.inputs[0]].view(count, -1).all(1)
            exact[node.name] = (arrangement.owner >= 0) & whole.repeat_interleave(arrangement.width // count)
        elif node.operation == "attention":  # queries, keys and values
            exact[node.name] = exact[node.inputs[0]].view(3, -1).all(0)
        elif node.parameters:
            exact[node.name] = exact[node.inputs[0]] & (arrangement.owner >= 0)
        elif node.operation == "concatenate":
            exact[node.name] = torch.cat([exact[name] for name in node.inputs])
        else:
            read = [exact[name] for name in node.inputs]
            repeated = [
                e.repeat_interleave(arrangement.width // len(e)) for e in read
            ]  # flatten widens a unit
            exact[node.name] = torch.stack(repeated).all(0)
    return exact
