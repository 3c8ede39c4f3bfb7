"""Calls that put whole dimensions in another order."""

import torch
import torch.fx

PERMUTES = {"permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT"}


def order_of(fx: torch.fx.Node, rank: int) -> list[int]:
    """Which dimension a call has in each place: what it does with dimensions of different extents."""
    line = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    return [n - 2 for n in fx.target(line, *fx.args[1:], **fx.kwargs).shape]
