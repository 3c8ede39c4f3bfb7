"""Torch's own layer for an operation of the table."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

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
