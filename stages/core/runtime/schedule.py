"""What every training here shares: how the learning rate goes, and what decays."""

import math
from typing import Any

from torch import nn


def cycle(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: linear from 0 to 1 over ``warmup``, then a cosine to 0.

    Loshchilov and Hutter 2017, SGDR, equation 5, without restarts and after a linear warm-up.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear maps decay; vectors (biases, norm scales and shifts) do not."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
