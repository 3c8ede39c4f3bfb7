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
    result = _zeros(values[0], layout.dim, parts.width)
    shares = entry_shares(network, alignment, name, values[0])
    for m, (value, share, positions) in enumerate(zip(values, shares, parts.positions, strict=True)):
        if setup.fit.targets == "own":
            decided = (parts.owner[positions] < 0).to(share.device)
            if decided.any():
                decided &= shares[task] > 0
            share = torch.where(decided, float(m == task), share)
        for start, stop in _runs(positions, share.tolist()):
            into = result.narrow(layout.dim, int(positions[start]), stop - start)
            part, own = value.narrow(layout.dim, start, stop - start), share[start:stop]
            if bool((own == 1).all()):
                into.add_(part)
            else:
                into.addcmul_(part, own.view(*[-1 if d == layout.dim else 1 for d in range(part.dim())]))
    return result


def _zeros(like: Tensor, dim: int, width: int) -> Tensor:
    """Of another width along ``dim``, in the same order in memory."""
    shape = [width if d == dim else size for d, size in enumerate(like.shape)]
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return torch.zeros_like(like.new_empty(1).expand(shape), memory_format=torch.channels_last)
    return like.new_zeros(shape)


def _runs(positions: Tensor, share: Sequence[float]) -> list[tuple[int, int]]:
    """Stretches of entries that count and lie side by side: those from ``start`` to ``stop``."""
    runs, places = [], positions.tolist()
    for entry, (place, counts) in enumerate(zip(places, share, strict=True)):
        if counts == 0:
            continue
        if runs and runs[-1][1] == entry and places[entry - 1] + 1 == place:
            runs[-1][1] = entry + 1
        else:
            runs.append([entry, entry + 1])
    return [(start, stop) for start, stop in runs]
