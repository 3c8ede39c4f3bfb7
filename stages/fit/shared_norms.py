"""Batch norms of a network that several ranks train together: each sees the statistics of the whole batch.

With n_r values of a unit on rank r, mean m_r and squares S_r about it, the batch has m = sum n_r m_r / n and variance
(sum S_r + n_r m_r^2) / n - m^2, in float64. The gradient goes through both.
"""

from functools import partial

import torch
from torch import Tensor, nn

from stages.core.merged.network import MergedNetwork
from stages.core.runtime import ranks


class SharedNorms:
    """Within this context batch norms in training mode normalise by what all ranks have; alone, they are as ever."""

    def __init__(self, network: MergedNetwork) -> None:
        nodes = network.trace.graph.nodes if ranks.count() > 1 else ()
        self._norms = [network.map_of(node) for node in nodes if node.operation == "batch_norm"]

    def __enter__(self) -> "SharedNorms":
        for norm in self._norms:
            norm.forward = partial(_forward, norm, norm.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for norm in self._norms:
            del norm.forward


def _forward(norm: nn.Module, alone: nn.Module, x: Tensor) -> Tensor:
    if not norm.training:
        return alone(x)
    norm.num_batches_tracked.add_(1)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    own = x.to(norm.running_mean.dtype)
    count, mean = x.numel() // x.shape[1], own.mean(dims)
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    squares = (own - mean.view(shape)).square().sum(dims)
    mean, squares = mean.double(), squares.double()
    sums = torch.stack([mean * count, squares + count * mean.square(), torch.full_like(mean, count)])
    total, squares, count = ranks.summed(sums)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    scale = (variance + norm.eps).rsqrt().to(own.dtype).view(shape)
    found = (own - mean.to(own.dtype).view(shape)) * scale
    if norm.affine:
        found = found * norm.weight.view(shape) + norm.bias.view(shape)
    return found.to(x.dtype)
