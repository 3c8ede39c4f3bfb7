"""A convolution whose kernel is mixed for each image is a mixture of convolutions (CondConv, dynamic convolution).

A few kernels are added up, each times a number of the image, and all images pass one convolution with a group for each
(Yang et al. 2019, Chen et al. 2020). What it gives is linear in its kernel: the same is a convolution with each of the
kernels, added up with the image's numbers, which is what is run, at the cost of as many convolutions.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
import torch.fx

from stages.core.graph.nodes import CONVOLUTIONS
from stages.core.tracing.export import opname
from stages.core.tracing.heads_apart import tensor_shape
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.radix import DEFAULTS
from stages.core.tracing.reader import RESHAPES
from stages.core.tracing.rewriting import arguments_of, called, of_the_input, unviewed

PADS = ("pad", "constant_pad_nd")
MOST_KERNELS = 16  # more are no mixture, but a kernel that a layer makes


@dataclass(frozen=True)
class _Mixture:
    """gates: (images, kernels). kernels: a tensor with one entry on its first dimension for each.

    around: what each image's kernel is multiplied with besides, (images, 1, outputs, inputs, ...), one at most of its
    outputs (2), inputs (3) and taps (4); by these numbers.
    """

    gates: torch.fx.Node | None
    kernels: torch.fx.Node
    around: Mapping[int, torch.fx.Node] = field(default_factory=dict)


def kernels_apart(graph: torch.fx.Graph, tensors: Container[str]) -> None:
    """Rewrite a graph of ATen calls in place. tensors: names of the placeholders that are no input."""
    values = of_the_input(graph, tensors)
    for node in list(graph.nodes):
        if node.op == "call_function" and opname(node) in CONVOLUTIONS:
            value, weight, *_, groups = arguments_of(node, DEFAULTS)
            if weight in values and groups % INPUT == 0 and tensor_shape(value)[0] == 1:
                _write(graph, node, values)


def _write(graph: torch.fx.Graph, node: torch.fx.Node, values: set[torch.fx.Node]) -> None:
    aten = torch.ops.aten
    value, weight, bias, stride, padding, dilation, groups = arguments_of(node, DEFAULTS)
    mixed = [_mixture(own, values) for own in (weight, bias) if own is not None]
    pads, images = [], unviewed(value)
    while images.op == "call_function" and opname(images) in PADS:  # TensorFlow's "same"
        pads.insert(0, images)
        images = unviewed(images.args[0])
    shape = tensor_shape(images)
    spatial = shape[2:] == tensor_shape(pads[0].args[0] if pads else value)[2:]
    apart = shape[:1] == [INPUT] and spatial and all(len(pad.args[1]) <= 2 * len(shape) - 4 for pad in pads)
    if not apart or any(own is None or own.gates is not mixed[0].gates for own in mixed):
        return
    gates, around = mixed[0].gates, mixed[0].around
    count, kernel = tensor_shape(mixed[0].kernels)[0], tensor_shape(weight)
    kernel, rank, found = [kernel[0] // INPUT, *kernel[1:]], len(shape), []
    if around and (len(mixed) > 1 or (4 in around and (rank != 4 or isinstance(padding, str)))):
        return
    with graph.inserting_before(node):
        for pad in pads:
            images = called(graph, node, pad.target, images, *pad.args[1:], **pad.kwargs)
        if 3 in around:
            images = called(
                graph, node, aten.mul.Tensor, images, _flat(graph, node, around[3], [1] * (rank - 2))
            )
        if 4 in around:
            images, kernel = _of_taps(graph, node, images, around[4], kernel)
            stride, padding, dilation = [1], [0], [1]
        for k in range(count):
            own = [called(graph, node, aten.select.int, part.kernels, 0, k) for part in mixed]
            own[0] = called(graph, node, aten.reshape.default, own[0], kernel)
            own += [None] * (2 - len(own))
            settings = stride, padding, dilation, groups // INPUT
            target = aten.conv1d.default if 4 in around else node.target
            found.append(called(graph, node, target, images, *own, *settings))
        whole = found[0]
        if gates is not None:
            stacked = called(graph, node, aten.stack.default, found, 1)
            ones = [1] * (stacked.meta["val"].dim() - 2)
            shares = called(graph, node, aten.reshape.default, gates, [INPUT, count, *ones])
            product = called(graph, node, aten.mul.Tensor, stacked, shares)
            whole = called(graph, node, aten.sum.dim_IntList, product, [1])
        if 4 in around:
            out = tensor_shape(node)
            whole = called(graph, node, aten.reshape.default, whole, [INPUT, out[1] // INPUT, *out[2:]])
        if 2 in around:
            whole = called(
                graph, node, aten.mul.Tensor, whole, _flat(graph, node, around[2], [1] * (rank - 2))
            )
        beside = called(graph, node, aten.reshape.default, whole, tensor_shape(node))
    node.replace_all_uses_with(beside)
    graph.eliminate_dead_code()


def _flat(
    graph: torch.fx.Graph, node: torch.fx.Node, gates: torch.fx.Node, behind: list[int]
) -> torch.fx.Node:
    """Numbers of each image, (images, n, ...)."""
    return called(graph, node, torch.ops.aten.reshape.default, gates, [INPUT, -1, *behind])


def _of_taps(
    graph: torch.fx.Graph, node: torch.fx.Node, images: torch.fx.Node, taps: torch.fx.Node, kernel: list[int]
) -> tuple[torch.fx.Node, list[int]]:
    """What each place sees, weighed tap by tap, and the shape of a kernel that reads it as a line of places."""
    aten = torch.ops.aten
    _, _, _, stride, padding, dilation, _ = arguments_of(node, DEFAULTS)
    stride, padding, dilation = (list(own) * (2 // len(own)) for own in (stride, padding, dilation))
    channels, count = tensor_shape(images)[1], math.prod(kernel[2:])
    seen = called(graph, node, aten.im2col.default, images, kernel[2:], dilation, padding, stride)
    places = tensor_shape(seen)[2]
    seen = called(graph, node, aten.reshape.default, seen, [INPUT, channels, count, places])
    weighed = called(graph, node, aten.reshape.default, taps, [INPUT, 1, count, 1])
    seen = called(graph, node, aten.mul.Tensor, seen, weighed)
    seen = called(graph, node, aten.reshape.default, seen, [INPUT, channels * count, places])
    return seen, [kernel[0], kernel[1] * count, 1]


def _mixture(node: torch.fx.Node, values: set[torch.fx.Node]) -> _Mixture | None:
    """What mixes a kernel: gates times a matrix of kernels, or a sum of kernels that gates were multiplied with."""
    node, found = unviewed(node), None
    if node not in values or node.op != "call_function":
        return None
    if opname(node) in ("mm", "matmul"):
        found = _Mixture(*node.args[:2])
    elif opname(node) == "einsum":
        terms, (gates, kernels, *_) = node.args[0].replace(" ", ""), [*node.args[1], None, None]
        given, _, out = terms.partition("->")
        first, _, second = given.partition(",")
        if kernels is not None and out == first[:1] + second[1:] and first[1:] == second[:1]:
            found = _Mixture(gates, kernels)
    elif opname(node) == "sum" and node.args[1:] in (([1],), (1,)) and opname(node.args[0]) == "mul":
        found = _of_product(node.args[0], values) or _around(node.args[0], values)
    if found is None or found.kernels in values or found.around:
        return found if found is not None and found.kernels not in values else None
    if found.gates not in values:
        return None
    shape, kernels = tensor_shape(found.gates), tensor_shape(found.kernels)
    alike = len(shape) == 2 and shape[0] == INPUT and kernels[:1] == shape[1:]
    return found if alike and shape[1] <= MOST_KERNELS else None


def _of_product(node: torch.fx.Node, values: set[torch.fx.Node]) -> _Mixture | None:
    for gates, kernels in (node.args[:2], node.args[1::-1]):
        if not isinstance(gates, torch.fx.Node) or gates not in values or kernels in values:
            continue
        own, shape = unviewed(gates), tensor_shape(gates)
        inner = kernels
        while opname(inner) in RESHAPES and math.prod(tensor_shape(inner)) == math.prod(
            tensor_shape(inner.args[0])
        ):
            inner = inner.args[0]
        if shape[2:] == [1] * len(shape[2:]) and tensor_shape(own) == shape[:2]:
            return _Mixture(own, inner)
    return None


def _around(node: torch.fx.Node, values: set[torch.fx.Node]) -> _Mixture | None:
    """A product of kernels, gates and what weighs outputs, inputs or taps (ODConv), in any order."""
    waiting, factors = [node], list[torch.fx.Node]()
    while waiting:
        own = waiting.pop()
        if isinstance(own, torch.fx.Node) and own in values and opname(own) in ("mul", "multiply"):
            waiting += own.args[:2]
        elif isinstance(own, torch.fx.Node):
            factors.append(own)
        elif own != 1:
            return None
    rank, constants = len(tensor_shape(node)), [own for own in factors if own not in values]
    if len(constants) != 1 or len(tensor_shape(constants[0])) != rank or tensor_shape(constants[0])[0] != 1:
        return None
    kernels, gates, around = constants[0], None, {}
    kernels = kernels.args[0] if opname(kernels) == "unsqueeze" else None
    for own in factors:
        shape = tensor_shape(own)
        if own in values:
            wide = {min(d, 4) for d, n in enumerate(shape) if d and n > 1}
            if len(shape) != rank or shape[0] != INPUT or len(wide) != 1 or wide & around.keys():
                return None
            (dim,) = wide
            if dim == 1 and gates is None:
                gates = unviewed(own) if tensor_shape(unviewed(own)) == shape[:2] else own
            elif dim == 1:
                return None
            else:
                around[dim] = own
    if (
        kernels is None
        or (gates is None and tensor_shape(kernels)[0] > 1)
        or tensor_shape(kernels)[0] > MOST_KERNELS
    ):
        return None
    return _Mixture(gates, kernels, around)
