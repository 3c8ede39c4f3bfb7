"""What the ridge of a layer's fit holds to, and what each network alone has there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.graph.folding import norm_scale
from stages.core.graph.nodes import oriented
from stages.core.units.groups import State
from stages.fit.average import average_block, average_vector, entry_shares
from stages.fit.layer import Layer


def starts(layer: Layer) -> list[Tensor]:
    """The average of the maps that are fitted, block by block: (rows, columns, ...) each.

    Where the batch norm behind is folded in, that is the average of the sources' scaled weights.
    """
    if not layer.folded:
        return list(layer.module.weights)
    setup, node, module = layer.setup, layer.node, layer.module
    layouts, alignment, shared = setup.network.trace.layouts, setup.alignment, setup.network.shared
    scaled = []
    for m, source in enumerate(setup.sources):
        weight = source.state[node.parameters["weight"]]
        weight = weight if node.grouped else oriented(node, weight)
        weight = weight * norm_scale(layer.norm, source.state).view(-1, *[1] * (weight.dim() - 1))
        if not node.grouped:  # an alignment by matrices covers no grouped map
            weight = alignment.read(weight, layouts[node.inputs[0]], shared, m)
            weight = alignment.view(weight, layouts[node.name], 0, shared, m)
        scaled.append(weight)
    shares = entry_shares(setup.network, setup.alignment, node.name, scaled[0])
    if node.grouped:
        return [average_vector(scaled, module.outputs, shares)]
    return [average_block(scaled, block, module.inputs, module.outputs, shares) for block in module.blocks]


def networks_weights(layer: Layer, states: Sequence[State]) -> list[list[Tensor]]:
    """What each network alone would put into a layer, block by block, zero where it has nothing.

    states: the sources' as seen through the alignment.
    """
    own = [oriented(layer.node, state[layer.node.parameters["weight"]]) for state in states]
    whole = [weight.new_ones(len(weight)) for weight in own]
    module = layer.module
    return [
        [average_block(lone, block, module.inputs, module.outputs, whole) for block in module.blocks]
        for lone in each_alone(own)
    ]


def each_alone(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each of the networks all their tensors, zero but for its own."""
    return [
        [own if n == m else torch.zeros_like(own) for n, own in enumerate(tensors)]
        for m in range(len(tensors))
    ]
