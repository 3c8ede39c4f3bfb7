"""The sources' values as the merged network's: what a layer reads and what it is fitted to, batch by batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.graph.folding import norm_scale
from stages.core.graph.nodes import Node
from stages.core.sweep.sweep import Sweep
from stages.fit.average import entry_shares
from stages.fit.setup import Setup


def inputs_of(setup: Setup, node: Node, sweep: Sweep, index: int) -> Tensor:
    """z of one batch, in the merged network's entries."""
    if setup.fit.inputs == "merged":
        return sweep.of_merged(node.inputs[0], index)
    values = [sweep.source(m, node.inputs[0], index) for m in range(len(setup.sources))]
    return assemble(setup, values, node.inputs[0], sweep.batches[index].task)


def targets_of(setup: Setup, node: Node, sweep: Sweep, index: int) -> Tensor:
    """y of one batch, in the merged network's entries."""
    values = [sweep.source(m, node.name, index) for m in range(len(setup.sources))]
    if node.name in setup.folded:
        norm = setup.folded[node.name]
        values = [s.run_node(norm, [v]) for s, v in zip(setup.sources, values, strict=True)]
    elif node.name in setup.scaled:  # what is mixed has the scale that the batch norm behind gives it
        norm, dim = setup.scaled[node.name], setup.network.trace.layouts[node.name].dim
        shape = [-1 if d == dim else 1 for d in range(values[0].dim())]
        scales = [norm_scale(norm, source.state).view(shape) for source in setup.sources]
        values = [v * scale for v, scale in zip(values, scales, strict=True)]
    return assemble(setup, values, node.name, sweep.batches[index].task)


def assemble(setup: Setup, values: Sequence[Tensor], name: str, task: int) -> Tensor:
    """Separate entries: their own network's. Shared ones: the mean (ensemble) or the owner's (own).

    values: each source's own, of the node ``name``. Where the owner has no part in a merged unit, its value is that of
    the others.
    """
    network, alignment = setup.network, setup.alignment
    layout, parts = network.trace.layouts[name], network.arrangement(name)
    values = [alignment.view(value, layout, layout.dim, network.shared, m) for m, value in enumerate(values)]
    shape = list(values[0].shape)
    shape[layout.dim] = parts.width
    result = values[0].new_zeros(shape)
    shares = entry_shares(network, alignment, name, values[0])
    for m, (value, share, positions) in enumerate(zip(values, shares, parts.positions, strict=True)):
        if setup.fit.targets == "own":
            decided = (parts.owner[positions] < 0).to(share.device)
            if decided.any():
                decided &= shares[task] > 0
            share = torch.where(decided, float(m == task), share)
        counted = share.nonzero().flatten()
        part = value if len(counted) == len(share) else value.index_select(layout.dim, counted)
        if (share[counted] != 1).any():
            part = part * share[counted].view(*[-1 if d == layout.dim else 1 for d in range(part.dim())])
        result.index_add_(layout.dim, positions.to(result.device)[counted], part)
    return result
