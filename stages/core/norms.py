"""Batch-norm statistics of a merged network, exact over a whole data set."""

import torch
from torch import Tensor

from stages.core.graph import Node
from stages.core.sweep import Sweep


def merged_moments(norm: Node, sweep: Sweep) -> Tensor:
    """Mean and variance of the merged network's values at a batch norm, tasks weighing alike: float64 (2, width)."""
    count, total, squares, shift = 0.0, 0.0, 0.0, None
    for index, batch in enumerate(sweep.batches):
        weight = sweep.weights[batch.task]
        x = sweep.of_merged(norm.inputs[0], index).double()
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shift = x.mean(dims, keepdim=True) if shift is None else shift
        x = x - shift
        count += weight * x.numel() / x.shape[1]
        total = total + weight * x.sum(dims)
        squares = squares + weight * x.square().sum(dims)
    mean = total / count
    return torch.stack([mean + shift.flatten(), (squares / count - mean.square()).clamp(min=0)])


def install_statistics(bn: torch.nn.Module, moments: Tensor, entries: Tensor) -> None:
    """Set the running mean and variance of some entries of a batch norm."""
    mean, variance = moments.to(bn.running_mean.dtype)
    bn.running_mean[entries] = mean[entries]
    bn.running_var[entries] = variance[entries]
