"""The sources' values as the merged network's: what a layer reads and what it is fitted to, batch by batch."""

from collections.abc import Callable, Sequence

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
    return assemble(
        setup, lambda m: sweep.source(m, node.inputs[0], index), node.inputs[0], sweep.batches[index].task
    )


def targets_of(setup: Setup, node: Node, sweep: Sweep, index: int) -> Tensor:
    """y of one batch, in the merged network's entries."""

    def value(m: int) -> Tensor:
        y, source = sweep.source(m, node.name, index), setup.sources[m]
        if node.name in setup.folded:
            return source.run_node(setup.folded[node.name], [y])
        if node.name in setup.scaled:  # what is mixed has the scale that the batch norm behind gives it
            dim, scale = (
                setup.network.trace.layouts[node.name].dim,
                norm_scale(setup.scaled[node.name], source.state),
            )
            return y * scale.view([-1 if d == dim else 1 for d in range(y.dim())])
        return y

    return assemble(setup, value, node.name, sweep.batches[index].task)


def assemble(setup: Setup, value: Callable[[int], Tensor], name: str, task: int) -> Tensor:
    """Separate entries: their own network's. Shared ones: the mean (ensemble) or the owner's (own).

    value: makes a source's own, of the node ``name``; asked of those alone that count. Where the owner has no part in
    a merged unit, its value is that of the others. What is returned may be the value itself.
    """
    network, alignment = setup.network, setup.alignment
    layout, parts = network.trace.layouts[name], network.arrangement(name)
    shares = _shares(setup, name, task)
    runs = [_runs(*own) for own in zip(parts.positions, (s.tolist() for s in shares), strict=True)]
    counted, result = [m for m, own in enumerate(runs) if own] or [0], None
    for m in counted:
        own, share = alignment.view(value(m), layout, layout.dim, network.shared, m), shares[m]
        if len(counted) == 1 and runs[m] == [(0, parts.width, 0)] and bool((share == 1).all()):
            return own
        if result is None:
            result = _zeros(own, layout.dim, parts.width)
        for start, stop, place in runs[m]:
            into = result.narrow(layout.dim, place, stop - start)
            part, counts = own.narrow(layout.dim, start, stop - start), share[start:stop]
            if bool((counts == 1).all()):
                into.add_(part)
            else:
                into.addcmul_(part, counts.view([-1 if d == layout.dim else 1 for d in range(part.dim())]))
    return result


def _shares(setup: Setup, name: str, task: int) -> list[Tensor]:
    """What each network counts for in its own entries of a value, for images of a task: (d,) each."""
    network, alignment = setup.network, setup.alignment
    parts, like = network.arrangement(name), next(network.parameters())
    shares = entry_shares(network, alignment, name, like)
    if setup.fit.targets != "own":
        return shares
    found = []
    for m, (share, positions) in enumerate(zip(shares, parts.positions, strict=True)):
        decided = (parts.owner[positions] < 0).to(share.device)
        if decided.any():
            decided &= shares[task] > 0
        found.append(torch.where(decided, float(m == task), share))
    return found


def _zeros(like: Tensor, dim: int, width: int) -> Tensor:
    """Of another width along ``dim``, in the same order in memory."""
    shape = [width if d == dim else size for d, size in enumerate(like.shape)]
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return torch.zeros_like(like.new_empty(1).expand(shape), memory_format=torch.channels_last)
    return like.new_zeros(shape)


def _runs(positions: Tensor, share: Sequence[float]) -> list[tuple[int, int, int]]:
    """Stretches of entries that count and lie side by side: from, to, and the place of the first."""
    runs: list[tuple[int, int, int]] = []
    for entry, (place, counts) in enumerate(zip(positions.tolist(), share, strict=True)):
        if counts == 0:
            continue
        if runs and runs[-1][1] == entry and runs[-1][2] + entry - runs[-1][0] == place:
            runs[-1] = (runs[-1][0], entry + 1, runs[-1][2])
        else:
            runs.append((entry, entry + 1, place))
    return runs
