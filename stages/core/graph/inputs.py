"""What an input must be: plain comparisons of sizes, which torch.compile and torch.export look through."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.core.graph.nodes import Graph
from stages.core.graph.source import Source
from stages.core.graph.trace import Trace
from stages.core.runtime.errors import InputError


def is_cast(device: torch.device) -> bool:
    """Whether torch casts what runs there (autocast): on some devices, as meta, it never does."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def as_taken(trace: Trace, x: Tensor, weight: Tensor) -> Tensor:
    """x: (n, ...), as the network's first operation takes it: whole numbers as floats where sources take them so.

    Raises InputError for other dimensions, channels or kinds of number than were traced. weight: one of the network's
    own, on whose device the input must be, and of its type unless torch casts it (autocast). Sizes of images are left
    to the layers that fix them.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"input: found {type(x).__name__}; allowed: a tensor")
    if x.layout != torch.strided:
        raise InputError(f"input: found a tensor of layout {x.layout}; allowed: an ordinary one")
    if x.device != weight.device:
        raise InputError(f"input: found it on {x.device}; allowed: {weight.device}, where the network is")
    dtype, casts = weight.dtype, is_cast(x.device) and x.dtype != torch.float64
    first = trace.graph.nodes[0]
    if first.attributes.get("counts") and not x.is_floating_point() and not x.is_complex():
        x = x.to(dtype)
    shape, whole = trace.shapes[first.name], first.attributes.get("integers", False)
    channels = len(shape) > 1 and not whole
    if x.dim() != len(shape) or (channels and x.shape[1] != shape[1]):
        raise InputError(f"input: found {of_shape(x.shape)}; allowed: {of_shape(shape)}")
    check_numbers(x, whole)
    if not whole and x.dtype != dtype and not casts:
        raise InputError(f"input: found {x.dtype}; allowed: {dtype}, as the network has it")
    return x


def taking_counts(source: Source) -> Source:
    """A network that takes whole numbers as the floats they are: so does what it is merged to."""
    first, *rest = source.graph.nodes
    first = replace(first, attributes={**first.attributes, "counts": True})
    return replace(source, trace=replace(source.trace, graph=Graph((first, *rest))))


def check_numbers(x: Tensor, whole: bool) -> None:
    """Raises InputError unless x holds floats, or whole numbers (tokens) where ``whole``."""
    if whole and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise InputError(f"input: found {x.dtype}; allowed: whole numbers")
    if not whole and not x.is_floating_point():
        raise InputError(f"input: found {x.dtype}; allowed: floats, preprocessed as for the sources")


def of_shape(shape: Sequence[int]) -> str:
    """A shape for a message: `n x 3 x 32 x 32`, whatever the number of images."""
    return " x ".join(["n", *(str(int(extent)) for extent in shape[1:])])
