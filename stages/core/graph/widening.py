"""Parameters that are wider than the value they are joined with: their entries are units that the value has not."""

from collections.abc import Sequence

import torch

from stages.core.graph.axes import Value


def widens(value: Value, out: torch.Size, shape: Sequence[int]) -> bool:
    """Whether a parameter gives each number of the input a row of its own (tokens of a table's columns)."""
    return value.common and len(shape) > 1 and value.shape[-1:] == (1,) and shape[-1] == out[-1] > 1


def repeats_one(read: Value, value: Value, seen: Sequence[int]) -> bool:
    """Whether a parameter has several entries where a value has its one unit.

    read: the value as it was; value: the same, of as many dimensions as what is made of it.
    """
    if value.common or len(value.dims) != 1 or value.labels.numel() > 1:
        return False
    at = value.dims[0] - (len(value.shape) - len(seen))
    return read.shape[read.dims[0]] == 1 and at >= 0 and seen[at] > 1
