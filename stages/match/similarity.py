"""Similarity of units from the joint moments of the networks' features. Larger is more alike."""

import torch
from torch import Tensor


def similarity(mean: Tensor, second: Tensor, networks: int, kind: str) -> Tensor:
    """All pairs of networks at once.

    mean (N d,), second (N d, N d): pooled over tasks. kind: inner (E[a b]), distance (minus E[(a - b)^2]) or
    correlation (Pearson; 0 where a unit is constant). Returns (N, N, d, d): entry [m, l, i, j] compares unit i of
    network m with unit j of network l.
    """
    if kind == "inner":
        full = second
    elif kind == "distance":
        energy = second.diagonal()
        full = 2 * second - energy[:, None] - energy[None, :]
    else:
        covariance = second - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        tiny = 1e-12 * second.diagonal().clamp(min=1e-300)
        scale = torch.where(variance > tiny, variance.clamp(min=1e-300).rsqrt(), 0.0)
        full = covariance * scale[:, None] * scale[None, :]
    d = len(full) // networks
    return full.view(networks, d, networks, d).transpose(1, 2)
