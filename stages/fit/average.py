"""Averaging: the merge of Git Re-Basin (Ainsworth et al. 2023) extended to separate units, and where a fit starts.

shared <- shared: the mean of the sources, each seen through its alignment (W = sum_m M_m W_m U_m of ZipIt!, CCA Merge
and OT Fusion; the plain mean of matched units where an alignment is a permutation). separate of m <- anything:
network m's own. shared <- separate of m: its own times its share, since the N copies add up to what the mean of N
shared units would have given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment, view_states
from stages.core.graph.nodes import COPIED, Node, oriented
from stages.core.graph.source import Source
from stages.core.merged.arrangement import Arrangement
from stages.core.merged.blocks import Block
from stages.core.merged.network import MergedNetwork
from stages.core.units.groups import State


def average_block(
    weights: Sequence[Tensor],
    block: Block,
    inputs: Arrangement,
    outputs: Arrangement,
    shares: Sequence[Tensor],
) -> Tensor:
    """weights: each source's (d_out, c_in, ...) in merged units; shares: what each counts for, (d_out,).

    Returns the block's (rows, columns, ...).
    """
    shape = (block.stop - block.start, len(block.columns), *weights[0].shape[2:])
    result = weights[0].new_zeros(shape)
    for m, (weight, share) in enumerate(zip(weights, shares, strict=True)):
        rows, merged_rows = _within(outputs.positions[m], block)
        read = torch.isin(inputs.positions[m], block.columns)
        columns = torch.searchsorted(block.columns, inputs.positions[m][read])
        own = share[rows].view(-1, *[1] * (weight.dim() - 1))
        result[merged_rows[:, None], columns] += weight[rows][:, read] * own
    return result


def average_vector(
    vectors: Sequence[Tensor], arrangement: Arrangement, shares: Sequence[Tensor], dim: int = 0
) -> Tensor:
    """Biases and other parameters with one entry per unit on ``dim``; shares: what each network counts for, (d,).

    Returns the same shape with the merged width on ``dim``.
    """
    shape, every = list(vectors[0].shape), [1] * vectors[0].dim()
    shape[dim], every[dim] = arrangement.width, -1
    result = vectors[0].new_zeros(shape)
    for vector, positions, share in zip(vectors, arrangement.positions, shares, strict=True):
        result.index_add_(dim, positions.to(vector.device), vector * share.view(every))
    return result


def entry_shares(network: MergedNetwork, alignment: Alignment, value: str, like: Tensor) -> list[Tensor]:
    """What each network counts for in its own entries of a value: (d,) each; 1 where they are its own alone."""
    if network.labels == "separate" and value in network.trace.graph.logits:
        return [like.new_ones(len(task.classes)) for task in network.tasks]
    return list(alignment.shares(network.trace.layouts[value], network.shared, like))


@torch.no_grad()
def fill_average(
    network: MergedNetwork, sources: Sequence[Source], alignment: Alignment | None = None
) -> None:
    """Give every layer of ``network`` the average of the sources, units in merged order."""
    alignment = alignment or Alignment(len(sources))
    states = view_states(sources, alignment, network.shared)
    for node in network.trace.graph.nodes:
        if node.linear:
            _fill_linear(network, node, states, alignment)
        elif node.operation in COPIED:
            network.map_of(node).average(states)
        elif node.parameters:
            module, arrangement = network.map_of(node), network.arrangement(node.name)
            example = _as_float(states[0][next(iter(node.parameters.values()))])
            shares = entry_shares(network, alignment, node.name, example)
            for role, name in node.parameters.items():
                tensors = [
                    network.trace.widened(node, role, _as_float(s[name]), len(p))
                    for s, p in zip(states, arrangement.positions, strict=True)
                ]
                dim = network.trace.unit_dim(node, role)
                getattr(module, role).copy_(average_vector(tensors, arrangement, shares, dim))


def _as_float(tensor: Tensor) -> Tensor:
    """Whole numbers, of a trace that keeps them, can be shared out."""
    return tensor if tensor.is_floating_point() else tensor.double()


def _fill_linear(network: MergedNetwork, node: Node, states: Sequence[State], alignment: Alignment) -> None:
    module = network.map_of(node)
    weights = [oriented(node, state[node.parameters["weight"]]) for state in states]
    shares = entry_shares(network, alignment, node.name, weights[0])
    for block, parameter in zip(module.blocks, module.weights, strict=True):
        parameter.copy_(average_block(weights, block, module.inputs, module.outputs, shares))
    if module.bias is not None:
        biases = [state[node.parameters["bias"]] for state in states]
        module.bias.copy_(average_vector(biases, module.outputs, shares))


def _within(positions: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Source rows that lie in a block, and where in it."""
    rows = ((positions >= block.start) & (positions < block.stop)).nonzero().flatten()
    return rows, positions[rows] - block.start
