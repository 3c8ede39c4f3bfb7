"""How the operations run that are more than one call of torch: on a source's values, and on a merged network's."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.core.graph.nodes import CONVOLUTIONS
from stages.core.runtime.errors import InputError

Inputs, Parameters, Attributes = Sequence[Tensor], Mapping[str, Tensor], Mapping[str, Any]
MOST_DIMENSIONS = 16


def mix(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A linear map over a dimension that is not the one of the units."""
    y = F.linear(x[0].movedim(a["dim"], -1), p["weight"].flatten(1), p.get("bias"))
    return y.movedim(-1, a["dim"])


def along(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A convolution that has the units among its positions. taps: multiply-accumulates for each entry of its output."""
    function = getattr(F, CONVOLUTIONS[len(a["stride"]) - 1])
    settings = {key: value for key, value in a.items() if key != "taps"}
    return function(x[0], p["weight"], p.get("bias"), **settings)


def batch_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.batch_norm(
        x[0], p["running_mean"], p["running_var"], p.get("weight"), p.get("bias"), False, 0.0, **a
    )


def norm_parameter(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A batch norm whose parameters broadcast to the value."""
    p = {role: own.view(a["view"]) for role, own in p.items()} if "view" in a else p
    y = (x[0] - p["running_mean"]) * (p["running_var"] + a["eps"]).rsqrt()
    return y * p["weight"] + p["bias"] if "weight" in p else y


def batch_statistics(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.batch_norm(x[0], None, None, p.get("weight"), p.get("bias"), True, 0.0, **a)


def layer_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    over = x[0].shape[-a.get("rank", 1) :]
    weight, bias = p.get("weight"), p.get("bias")
    if all(own is None or own.shape == over for own in (weight, bias)):
        return F.layer_norm(x[0], over, weight, bias, a["eps"])
    y = F.layer_norm(x[0], over, None, None, a["eps"])  # parameters as wide as units beside those it reduces
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def group_norm(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return F.group_norm(x[0], a["groups"], p.get("weight"), p.get("bias"), a["eps"])


def attention(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    mask = p.get("mask", x[3] if len(x) > 3 else None)
    windows = a.get("windows", 0)
    a = {key: value for key, value in a.items() if key != "windows"}
    if windows:  # dimensions beside the images: kernels and ONNX know one ahead of the heads
        found = F.scaled_dot_product_attention(*(own.flatten(0, windows) for own in x), **a)
        return found.reshape(x[0].shape[:-1] + x[2].shape[-1:])
    return F.scaled_dot_product_attention(x[0], x[1], x[2], mask, **a)


def rearrange(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """Every dimension cut into factors (atoms), these put in order, neighbours joined.

    free: for each dimension the factor whose extent is what the value gives (images, units).
    """
    sizes: list[int] = []
    for extent, atoms, free in zip(x[0].shape, a["atoms"], a["free"], strict=True):
        if free is None:
            if extent != math.prod(atoms):
                raise InputError(
                    f"input: gives {extent} entries where {math.prod(atoms)} are rearranged; allowed: inputs of the "
                    "size that was traced"
                )
            sizes += atoms
        else:
            others = math.prod(atoms[:free] + atoms[free + 1 :])
            sizes += [*atoms[:free], extent // others, *atoms[free + 1 :]]
    shape, at = [], 0
    for count in a["groups"]:
        shape.append(math.prod([sizes[i] for i in a["order"][at : at + count]]))
        at += count
    return x[0].reshape(sizes).permute(a["order"]).reshape(shape)


def concatenate(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    if not p:
        return torch.cat(list(x), a["dim"])
    shape = list(x[0].shape)
    shape[a["dim"] % len(shape)] = p["value"].shape[a["dim"] % len(shape) - len(shape)]
    both = [p["value"].expand(shape), x[0]]
    return torch.cat(both if a["first"] else both[::-1], a["dim"])


def hypot(a: Tensor, b: Tensor) -> Tensor:
    """As ``torch.hypot``, which ONNX does not know."""
    return (a * a + b * b).sqrt()


def constant(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """The same for each image. images: which of ``rank`` dimensions counts them. common, even: see rules."""
    if not 0 < a["rank"] <= MOST_DIMENSIONS:
        raise ValueError(f"a constant of {a['rank']} dimensions")
    return p["value"].expand([x[0].size(0) if d == a["images"] else -1 for d in range(a["rank"])])


def select(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """A copy: a view would hold on to all that was left behind."""
    return x[0].select(a["dim"], a["index"]).clone()


def sliced(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    every = [slice(None)] * (a["dim"] % x[0].dim())
    return x[0][(*every, slice(a["start"], a["stop"], a["step"]))].clone()


def pick(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return x[0].index_select(a["dim"], torch.tensor(a["index"], device=x[0].device))


def pad(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    if not x[0].is_floating_point():  # where units are: what is new has none
        return F.pad(x[0], a["pad"])
    return F.pad(x[0], a["pad"], a.get("mode", "constant"), a.get("value"))


def expand(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return x[0].expand(a["sizes"])


def softmax(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return torch.softmax(x[0], a["dim"])


def log_softmax(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    return torch.log_softmax(x[0], a["dim"])


def neighbours(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """part: whether the channels of dimension 2 are looked at, those of each part of dimension 1 for themselves."""
    settings = {key: value for key, value in a.items() if key != "part"}
    if not a.get("part"):
        return F.local_response_norm(x[0], **settings)
    return F.local_response_norm(x[0].flatten(0, 1), **settings).reshape_as(x[0])


def length(x: Tensor, dims: Sequence[int], keepdim: bool, order: float = 2) -> Tensor:
    return torch.linalg.vector_norm(x, order, dims, keepdim)


LONE = {  # reductions that torch does not have by these names, or over one dimension alone
    "length": length,
    "prod": lambda x, dims, keepdim: x.prod(dims[0], keepdim),
    "median": lambda x, dims, keepdim: x.median(dims[0], keepdim).values,
    "kthvalue": lambda x, dims, keepdim, k: x.kthvalue(k, dims[0], keepdim).values,
}


def compared(name: str) -> Callable[..., Tensor]:
    """A comparison as one and zero of the value's type, which can be kept and multiplied as any value."""
    return lambda x, value: getattr(torch, name)(x, value).to(x.dtype)


def where(x: Inputs, p: Parameters, a: Attributes) -> Tensor:
    """Of two values, or a value and a number (true, false): the first where the condition, given first, is not zero."""
    rest = iter(x[1:])
    chosen = [a[role] if role in a else next(rest) for role in ("true", "false")]
    found = torch.where(x[0] != 0, *chosen)
    return found if a.get("integers") else found.to(x[0].dtype)  # integers: what tokens decide
