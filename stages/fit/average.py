"""Averaging: the merge of Git Re-Basin (Ainsworth et al. 2023) extended to separate units, and where a fit starts.

shared <- shared: the mean of the sources. separate of m <- anything: network m's own. shared <- separate of m: its
own divided by N, since its N copies add up to what the mean of N shared units would have given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.blocks import Block, Parts
from stages.core.graph import Node
from stages.core.network import MergedNetwork, Source


def average_block(weights: Sequence[Tensor], block: Block, inputs: Parts, outputs: Parts) -> Tensor:
    """weights: each aligned source's (d_out, c_in, ...). Returns the block's (rows, columns, ...)."""
    shape = (block.stop - block.start, len(block.columns), *weights[0].shape[2:])
    result = weights[0].new_zeros(shape)
    for m, weight in enumerate(weights):
        rows, merged_rows = _within(outputs.positions[m], block)
        read = torch.isin(inputs.positions[m], block.columns)
        columns = torch.searchsorted(block.columns, inputs.positions[m][read])
        share = _share(outputs.owner[merged_rows + block.start], weights)
        part = weight[rows][:, read] * share.view(-1, *[1] * (weight.dim() - 1))
        result[merged_rows[:, None], columns] += part
    return result


def average_vector(vectors: Sequence[Tensor], parts: Parts, dim: int = 0) -> Tensor:
    """Biases and other parameters with one entry per unit on ``dim``: mean of shared entries, own separate ones.

    Returns the same shape with the merged width on ``dim``.
    """
    shape, every = list(vectors[0].shape), [1] * vectors[0].dim()
    shape[dim], every[dim] = parts.width, -1
    result = vectors[0].new_zeros(shape)
    for vector, positions in zip(vectors, parts.positions, strict=True):
        share = _share(parts.owner[positions], vectors).view(every)
        result.index_add_(dim, positions.to(vector.device), vector * share)
    return result


def _share(owner: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """What a network's part counts for in each entry: 1/N where the entry is shared, else 1."""
    share = tensors[0].new_ones(len(owner))
    share[owner < 0] = 1 / len(tensors)
    return share


@torch.no_grad()
def fill_average(network: MergedNetwork, sources: Sequence[Source]) -> None:
    """Give every layer of ``network`` the average of the aligned sources."""
    for node in network.trace.graph.nodes:
        if node.linear:
            _fill_linear(network, node, sources)
        elif node.parameters:
            module, parts = network.map_of(node), network.parts(node.name)
            for role, name in node.parameters.items():
                tensors, dim = [s.state[name] for s in sources], network.trace.unit_dim(node, role)
                getattr(module, role).copy_(average_vector(tensors, parts, dim))


def _fill_linear(network: MergedNetwork, node: Node, sources: Sequence[Source]) -> None:
    module = network.map_of(node)
    weights = [source.state[node.parameters["weight"]] for source in sources]
    for block, parameter in zip(module.blocks, module.weights, strict=True):
        parameter.copy_(average_block(weights, block, module.inputs, module.outputs))
    if module.bias is not None:
        biases = [source.state[node.parameters["bias"]] for source in sources]
        module.bias.copy_(average_vector(biases, module.outputs))


def _within(positions: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Source rows that lie in a block, and where in it."""
    rows = ((positions >= block.start) & (positions < block.stop)).nonzero().flatten()
    return rows, positions[rows] - block.start
