"""What a plain network is written with: torch's own layers, picked entries, tensors in a source's shape."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from stages.core.graph.nodes import Node

CONVOLUTION_LAYERS = {
    "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d, "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d, "conv_transpose3d": nn.ConvTranspose3d,
}  # fmt: skip


def layer_of(
    node: Node, attributes: Mapping[str, Any], tensors: Mapping[str, Tensor], sizes: Sequence[int]
) -> nn.Module | None:
    """The layer that does a node's operation with ``tensors`` (by role); None where torch has none that fits.

    sizes: what a layer norm reduces.
    """
    layer, operation = None, node.operation
    weight, bias = tensors.get("weight"), "bias" in tensors
    if operation == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias)
    elif operation in CONVOLUTION_LAYERS:
        layer = _convolution(CONVOLUTION_LAYERS[operation], attributes, weight, bias)
    elif operation == "embedding":
        layer = nn.Embedding(*weight.shape)
    elif operation == "layer_norm" and weight is not None and tuple(weight.shape) == tuple(sizes):
        layer = nn.LayerNorm(tuple(sizes), attributes["eps"], bias=bias)
    elif operation == "group_norm" and weight is not None and bias:
        layer = nn.GroupNorm(attributes["groups"], len(weight), attributes["eps"])
    if layer is None:
        return None
    for role, tensor in tensors.items():
        setattr(layer, role, nn.Parameter(tensor.detach().clone()))
    return layer


def _convolution(kind: type, attributes: Mapping[str, Any], weight: Tensor, bias: bool) -> nn.Module:
    groups, transposed = attributes.get("groups", 1), issubclass(kind, nn.modules.conv._ConvTransposeNd)
    ends = (weight.shape[0], weight.shape[1] * groups)
    read, written = ends if transposed else ends[::-1]
    own = {key: _tuple(value) for key, value in attributes.items() if key != "groups"}
    return kind(read, written, tuple(weight.shape[2:]), groups=groups, bias=bias, **own)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def picked(x: Proxy, dim: int, index: Sequence[int]) -> Proxy:
    """Entries of a dimension, by numbers that stand in the code: they are no part of the state."""
    start, many = (index[0], len(index)) if index else (0, 0)
    if list(index) == list(range(start, start + many)):
        return x.narrow(dim, start, many)
    return x[(slice(None),) * dim + (list(index),)]


def as_source(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A merged parameter in its source's shape, where it has as many entries or one that all units have in common."""
    if tensor.numel() == math.prod(shape):
        return tensor.reshape(shape)
    if math.prod(shape) == 1 and bool((tensor == tensor.flatten()[0]).all()):
        return tensor.flatten()[:1].reshape(shape)
    return tensor
