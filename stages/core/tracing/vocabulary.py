"""What torch calls an operation: modules, functions and methods that mean the same become the same operation.

Nothing is guessed: what is not listed here has no rule.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stages.core.runtime.errors import InputError

Reading = tuple[str, dict[str, Any], tuple[str, ...]]  # operation, attributes, parameter roles

STATE = ("weight", "bias", "running_mean", "running_var")  # what norms may have
ALIAS = "alias"  # passes its input on

MODULES: dict[type[nn.Module], Callable[[Any], Reading]] = {
    nn.Identity: lambda m: (ALIAS, {}, ()),
    nn.Dropout: lambda m: (ALIAS, {}, ()),
    nn.Dropout2d: lambda m: (ALIAS, {}, ()),
    nn.Linear: lambda m: ("linear", {}, ("weight", "bias")),
    nn.Conv2d: lambda m: ("conv2d", _conv_attributes(m), ("weight", "bias")),
    nn.BatchNorm1d: lambda m: ("batch_norm", {"eps": m.eps}, STATE),
    nn.BatchNorm2d: lambda m: ("batch_norm", {"eps": m.eps}, STATE),
    nn.LayerNorm: lambda m: ("layer_norm", {"eps": m.eps}, _AFFINE),
    nn.GroupNorm: lambda m: ("group_norm", {"groups": m.num_groups, "eps": m.eps}, _AFFINE),
    nn.InstanceNorm2d: lambda m: ("group_norm", {"groups": m.num_features, "eps": m.eps}, _AFFINE),
    nn.Flatten: lambda m: flatten_recipe(m.start_dim, m.end_dim),
    nn.MaxPool2d: lambda m: ("max_pool2d", _pool_attributes(m) | {"dilation": m.dilation}, ()),
    nn.AvgPool2d: lambda m: (
        "avg_pool2d",
        _pool_attributes(m) | {"count_include_pad": m.count_include_pad},
        (),
    ),
    nn.AdaptiveAvgPool2d: lambda m: ("adaptive_avg_pool2d", {"output_size": m.output_size}, ()),
    nn.AdaptiveMaxPool2d: lambda m: ("adaptive_max_pool2d", {"output_size": m.output_size}, ()),
    nn.ReLU: lambda m: ("relu", {}, ()),
    nn.ReLU6: lambda m: ("relu6", {}, ()),
    nn.GELU: lambda m: ("gelu", {"approximate": m.approximate}, ()),
    nn.SiLU: lambda m: ("silu", {}, ()),
    nn.LeakyReLU: lambda m: ("leaky_relu", {"negative_slope": m.negative_slope}, ()),
    nn.ELU: lambda m: ("elu", {"alpha": m.alpha}, ()),
    nn.Hardswish: lambda m: ("hardswish", {}, ()),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", {}, ()),
    nn.Mish: lambda m: ("mish", {}, ()),
    nn.Sigmoid: lambda m: ("sigmoid", {}, ()),
    nn.Tanh: lambda m: ("tanh", {}, ()),
}
_AFFINE = ("weight", "bias")

# Functions and methods of one name mean the same: (operation, names of the arguments after the input).
CALLS: dict[Any, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), ("relu", ())),
    **dict.fromkeys((torch.sigmoid, "sigmoid"), ("sigmoid", ())),
    **dict.fromkeys((torch.tanh, "tanh"), ("tanh", ())),
    F.relu6: ("relu6", ()),
    F.gelu: ("gelu", ("approximate",)),
    F.silu: ("silu", ()),
    F.leaky_relu: ("leaky_relu", ("negative_slope",)),
    F.elu: ("elu", ("alpha",)),
    F.hardswish: ("hardswish", ()),
    F.hardsigmoid: ("hardsigmoid", ()),
    F.mish: ("mish", ()),
    F.max_pool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    F.avg_pool2d: ("avg_pool2d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", ("output_size",)),
    F.adaptive_max_pool2d: ("adaptive_max_pool2d", ("output_size",)),
    F.linear: ("linear", ("weight", "bias")),
    F.conv2d: ("conv2d", ("weight", "bias", "stride", "padding", "dilation", "groups")),
    F.batch_norm: (
        "batch_norm",
        ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    F.layer_norm: ("layer_norm", ("normalized_shape", "weight", "bias", "eps")),
    **dict.fromkeys((F.dropout, F.dropout2d, "contiguous"), (ALIAS, ("p", "training", "inplace"))),
    **dict.fromkeys((torch.flatten, "flatten"), ("flatten", ("start_dim", "end_dim"))),
    **dict.fromkeys((torch.mean, "mean"), ("mean", ("dim", "keepdim"))),
    **dict.fromkeys((torch.cat, torch.concat), ("concatenate", ("dim",))),
}
RESHAPES = ("view", "reshape", "squeeze", torch.reshape, torch.squeeze)  # read off the shapes
PERMUTES = ("permute", "transpose", torch.permute, torch.transpose)
TORCHVISION_ALIASES = ("torchvision.ops.stochastic_depth.stochastic_depth",)  # named, so as not to import it
BINARY: dict[Any, tuple[str, str]] = {  # (on two values, on a value and a number)
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), ("add", "shift")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), ("multiply", "scale")),
}


def flatten_recipe(start: int, end: int) -> Reading:
    """Dimensions ``start`` to ``end`` become one; the usual case (1 to -1) is written without attributes."""
    if start == 0:
        raise InputError(f"flatten from {start} to {end}; allowed: from 1 on, the batch stays")
    return "flatten", {} if (start, end) == (1, -1) else {"start": start, "end": end}, ()


def _conv_attributes(m: nn.Conv2d) -> dict[str, Any]:
    padding = m.padding if isinstance(m.padding, str) else list(m.padding)
    found = {"stride": list(m.stride), "padding": padding, "dilation": list(m.dilation)}
    return found if m.groups == 1 else {**found, "groups": m.groups}


def _pool_attributes(m: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {"kernel_size": m.kernel_size, "stride": m.stride, "padding": m.padding, "ceil_mode": m.ceil_mode}
