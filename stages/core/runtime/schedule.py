"""How a learning rate goes."""

import math


def cycle(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: linear from 0 to 1 over ``warmup``, then a cosine to 0.

    Loshchilov and Hutter 2017, SGDR, equation 5, without restarts and after a linear warm-up.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
