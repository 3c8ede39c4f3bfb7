"""Fourier transforms over places (GFNet, AFNO, FNet): linear maps that do the same to every unit.

A complex number is two values, its real and its imaginary part; each of the two is a node of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.graph.axes import NONE, Units, Value, join
from stages.core.graph.nodes import Node
from stages.core.graph.rules import Shapes
from stages.core.graph.runs import Attributes, Inputs, Parameters
from stages.core.runtime.errors import InputError

TRANSFORMS = ("fftn", "ifftn", "rfftn", "irfftn")


def transform(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """x: a real part, and an imaginary one where there is any. part: real or imaginary, of what it gives.

    kind: of TRANSFORMS. sizes_over: extents of the dimensions ``dims`` behind it, or nothing.
    """
    if a["kind"] not in TRANSFORMS:
        raise ValueError(f"a transform {a['kind']}")
    value = x[0] if len(x) == 1 else torch.complex(x[0], x[1])
    found = getattr(torch.fft, a["kind"])(value, a["sizes_over"], a["dims"], a["norm"])
    if a["kind"] == "irfftn":  # real
        return found
    return (found.real if a["part"] == "real" else found.imag).contiguous()


def transformed(units: Units, node: Node, inputs: Sequence[Value], out: torch.Size, shapes: Shapes) -> Value:
    """Units stay where they are; none lie on what is transformed."""
    rank, common = len(out), all(own.common for own in inputs)
    over = {d % rank for d in node.attributes["dims"]}
    if common:
        return Value(torch.full([1] * rank, NONE), (), out, True)
    if over & {d for own in inputs for d in own.dims if not own.common}:
        raise InputError(f"{node.name}: {node.operation} over the units; allowed: over places")
    first, *others = (Value(own.labels, own.dims, out, own.common, held=own.held) for own in inputs)
    for other in others:
        first = join(units, node.name, first, other, out)
    return first
