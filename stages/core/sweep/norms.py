"""Means and variances over a whole data set, and batch norms that are given them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.runtime import ranks
from stages.core.runtime.cache import Storage
from stages.core.sweep.batches import Batch
from stages.core.sweep.memory import peak_bytes, place_values
from stages.core.sweep.pooling import pool_moments
from stages.core.sweep.sweep import Merged, Sweep


def moments_of(sweep: Sweep, value: Callable[[int], Tensor], dim: int, task: int | None = None) -> Tensor:
    """Mean and variance of each entry along ``dim``, tasks weighing alike: float64 (2, width).

    Entries are summed in their own type within a batch, less the first batch's mean; batches are summed in float64.
    value: a batch's index -> its values. task: only that task's images.
    """
    count, total, squares, shift = 0.0, 0.0, 0.0, None
    for index, batch in enumerate(sweep.batches):
        if task not in (None, batch.task):
            continue
        weight = sweep.weights[batch.task]
        x = value(index)
        dims = [other for other in range(x.dim()) if other != dim]
        shift = x.mean(dims, keepdim=True) if shift is None else shift
        x = x - shift
        count += weight * x.numel() / x.shape[dim]
        total = total + weight * x.sum(dims).double()
        squares = squares + weight * x.square_().sum(dims).double()
    mean = total / count
    if ranks.count() > 1:
        return torch.stack(pool_moments(count, mean + shift.flatten(), squares - count * mean.square()))
    return torch.stack([mean + shift.flatten(), (squares / count - mean.square()).clamp(min=0)])


def merged_moments(norm: Node, sweep: Sweep) -> Tensor:
    """Mean and variance of what the merged network's batch norm reads: float64 (2, merged width)."""
    return moments_of(sweep, lambda index: sweep.of_merged(norm.inputs[0], index), 1)


def moments_bytes(network: Merged, norm: Node, batch: int) -> int:
    """Memory of what ``merged_moments`` works with, for batches of so many images."""
    return 16 * batch * max(network.entries(name) for name in (norm.inputs[0], norm.name))


def install_statistics(bn: torch.nn.Module, moments: Tensor, entries: Tensor) -> None:
    """Set the running mean and variance of some entries of a batch norm."""
    mean, variance = moments.to(bn.running_mean.dtype)
    bn.running_mean[entries] = mean[entries]
    bn.running_var[entries] = variance[entries]


class _Statistics:
    """The visitor that sets the statistics of every batch norm, but those of the entries that are ``kept``."""

    def __init__(self, network: Merged, kept: Mapping[str, Tensor], same: bool = False) -> None:
        self.network, self.kept, self.same = network, kept, same

    def wants(self, node: Node) -> bool:
        return node.operation == "batch_norm"

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        return moments_bytes(self.network, node, batch)

    def kept_bytes(self, node: Node, images: int) -> int:
        return 0

    def visit(self, node: Node, sweep: Sweep) -> None:
        moments, norm = merged_moments(node, sweep), self.network.map_of(node)
        entries, before = ~self.kept[node.name].to(moments.device), _affine(norm)
        install_statistics(norm, moments, entries)
        if self.same and norm.affine:
            scale, shift = before
            norm.weight[entries] = (scale * (norm.running_var + norm.eps).sqrt())[entries]
            norm.bias[entries] = (shift + norm.running_mean * scale)[entries]


def _affine(norm: torch.nn.Module) -> tuple[Tensor, Tensor] | None:
    """What a batch norm in use scales and shifts by, where it has a scale."""
    if not norm.affine:
        return None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def statistics_bytes(
    network: Merged,
    kept: Mapping[str, Tensor],
    batches: Sequence[Batch],
    precision: torch.dtype | None = None,
) -> int:
    """What ``set_statistics`` holds at most."""
    return peak_bytes(Sweep([], batches, network, precision), _Statistics(network, kept))


def set_statistics(
    network: Merged,
    kept: Mapping[str, Tensor],
    batches: Sequence[Batch],
    precision: torch.dtype | None = None,
    storage: Storage = "memory",
    memory: float | None = None,
    progress: str | None = None,
    what: str = "recalibrate",
    same: bool = False,
) -> None:
    """Reset every batch norm of ``network`` to the exact mean and variance of its own values, in place.

    batches: unlabelled images of every task, which weigh alike. kept: bool (merged width,) by node name, entries whose
    statistics stay. same: scale and shift follow, so that the function stays. Raises InputError, about ``what``,
    when it would not fit in memory.
    """
    visitor, sweep = _Statistics(network, kept, same), Sweep([], batches, network, precision)
    place_values(sweep, visitor, storage, memory, what)
    sweep.run(visitor, progress)
