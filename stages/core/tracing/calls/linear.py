"""Linear maps: layers, convolutions, products of matrices, tables."""

import string
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.fx
from torch import Tensor

from stages.core.graph.nodes import CONVOLUTIONS, TRANSPOSED, Node
from stages.core.tracing.bare import unexpanded, without
from stages.core.tracing.einsum import read_einsum
from stages.core.tracing.export import opname
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import RESHAPES, Reader, images_at
from stages.core.tracing.rearranging import Factors
from stages.core.tracing.rewriting import called


def _linear(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    parameters = reader.roles(fx, given, {"weight": "weight", "bias": "bias"})
    reader.node(fx, "linear", [given["input"]], {}, parameters)


def _addmm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    if (
        reader.is_value(given["self"])
        or reader.is_value(given["mat2"])
        or given["beta"] != 1
        or given["alpha"] != 1
    ):
        raise reader.unknown(fx, "addmm of values")
    weight = reader.folding.want(reader.through(given["mat2"]), transposed=True)
    parameters = {"weight": weight, "bias": reader.parameter(given["self"])}
    reader.node(fx, "linear", [given["mat1"]], {}, parameters)


def _matmul(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Of two values, or of a value and a constant: a linear map, a table for each head, or a value of every image."""
    a, b = given["self"], given.get("other", given.get("mat2"))
    if reader.is_value(a) and reader.is_value(b):
        reader.node(fx, "matmul", [a, b])
        return
    lone = reader.is_value(a)
    known = b if lone else a
    if len(reader.shape(known)) == 3 and images_at(known.meta["val"]) is not None:
        reader.node(fx, "matmul", [a, b])  # learned queries or keys, expanded to all images
        return
    table = unexpanded(reader, known)
    shape = reader.shape(table)
    lead = [d for d in range(len(shape) - 2) if shape[d] == 1]
    ahead = [d for d in lead if d < next((i for i, n in enumerate(shape) if n > 1), 0)]
    several = len(lead) < len(shape) - 2 and not any(n % INPUT == 0 for n in shape)
    if not several and (lone or len(shape) == 2 or shape[-1] == shape[-2]):
        table, several = without(reader, table, lead), False
    if lone and len(reader.shape(table)) == 2:
        weight = reader.folding.want(table, transposed=True)
        reader.node(fx, "linear", [a], {}, {"weight": weight})
    elif not lone and len(reader.shape(table)) == 2 < len(reader.shape(b)):
        _in_front(reader, fx, "linear", {"weight": reader.parameter(table)}, b)
    elif several and lone:
        table = without(reader, table, ahead)
        reader.node(fx, "matmul_parameter", [a], {}, {"value": reader.parameter(table)})
    elif several:
        table = without(reader, table, ahead)
        _in_front(reader, fx, "matmul_parameter", {"value": reader.folding.want(table, transposed=True)}, b)
    else:
        reader.node(fx, "matmul", [a, b])  # one of the two as a value that is the same for every image


def _in_front(
    reader: Reader, fx: torch.fx.Node, operation: str, parameters: Mapping[str, str], value: torch.fx.Node
) -> None:
    """A matrix, or one for each head, in front of a value: a linear map over the dimension before the last."""
    shape, name = reader.shape(value), reader.name(fx, {})
    letters = string.ascii_letters[: len(shape)]
    swapped = letters[:-2] + letters[-1] + letters[-2]
    sizes = dict(zip(letters, shape, strict=True))
    turned = reader.arranged(f"{name}_turned", reader.value(value), letters, swapped, sizes)
    reader.add(Node(f"{name}_map", operation, (turned,), {}, parameters))
    sizes |= dict(zip(letters, reader.shape(fx), strict=True))
    reader.names[fx] = reader.arranged(name, f"{name}_map", swapped, letters, sizes)


def _einsum(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    read_einsum(reader, fx, given)


def _convolve(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    spatial = len(reader.shape(given["input"])) - 2
    if name == "conv2d" and _spans_last(reader, given):
        _over_units(reader, fx, given)
        return
    parameters = reader.roles(fx, given, {"weight": "weight", "bias": "bias"})
    padding = given["padding"]
    attributes = {
        "stride": _each(given["stride"], spatial),
        "padding": padding if isinstance(padding, str) else _each(padding, spatial),
        "dilation": _each(given["dilation"], spatial),
    }
    if "output_padding" in given and any(_each(given["output_padding"], spatial)):
        attributes["output_padding"] = _each(given["output_padding"], spatial)
    if given["groups"] != 1:
        attributes["groups"] = given["groups"]
    reader.node(fx, name, [given["input"]], attributes, parameters)


def _spans_last(reader: Reader, given: Mapping[str, Any]) -> bool:
    """Whether a kernel reads the whole of the last dimension at once, where an embedding's columns lie (Kim 2014)."""
    shape, kernel, source = reader.shape(given["input"]), reader.shape(given["weight"]), given["input"]
    while source.op == "call_function" and opname(source) in RESHAPES:
        source = source.args[0]
    padding = given["padding"]
    flat = padding == "valid" or (not isinstance(padding, str) and _each(padding, 2)[1] == 0)
    plain = flat and given["groups"] == 1 and _each(given["dilation"], 2)[1] == 1
    return plain and shape[1] == 1 < shape[3] == kernel[3] and source.op != "placeholder"


def _over_units(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """(n, 1, places, units), read whole, as a convolution over places whose channels are the units."""
    shape, (out, _, taps, units) = reader.shape(given["input"]), reader.shape(given["weight"])
    name, sizes = reader.name(fx, {}), dict(zip("nctu", shape, strict=True))
    turned = reader.arranged(f"{name}_units", reader.value(given["input"]), "nctu", ["n", "cu", "t"], sizes)
    weight = reader.folding.want(
        reader.through(given["weight"]), order=(0, 1, 3, 2), shape=(out, units, taps)
    )
    parameters = {"weight": weight}
    if given.get("bias") is not None:
        parameters["bias"] = reader.parameter(given["bias"])
    first = {key: _each(given[key], 2)[:1] for key in ("stride", "dilation")}
    first["padding"] = (
        given["padding"] if isinstance(given["padding"], str) else _each(given["padding"], 2)[:1]
    )
    reader.add(Node(f"{name}_places", "conv1d", (turned,), first, parameters))
    factors = Factors.of(reader.shape(fx)[:3])
    factors.reshape(reader.shape(fx))
    reader.add(Node(name, "rearrange", (f"{name}_places",), factors.attributes()))
    reader.names[fx] = name


def _convolution(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    kind = "conv_transpose" if given["transposed"] else "conv"
    own = {k: v for k, v in given.items() if k != "output_padding" or given["transposed"]}
    _convolve(reader, fx, own, f"{kind}{len(reader.shape(given['input'])) - 2}d")


def _embedding(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reader.node(fx, "embedding", [given["indices"]], {}, reader.roles(fx, given, {"weight": "weight"}))


def _one_hot(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Rows of a table of ones and zeros: features that are computed from the input alone."""
    if reader.is_value(given["self"]) and given["self"].meta["val"].is_floating_point():
        raise reader.unknown(fx, "one_hot of other than whole numbers")
    waiting = [fx]
    while waiting:  # as the table is, so is what is made of it
        own = waiting.pop()
        if isinstance(own.meta.get("val"), Tensor) and own.meta["val"].dtype == torch.int64:
            own.meta = {**own.meta, "val": own.meta["val"].float()}
            waiting += own.users
    with reader.graph.inserting_before(fx):
        table = called(reader.graph, fx, torch.ops.aten.eye.default, given["num_classes"])
    reader.known.add(table)
    parameters = {"weight": reader.parameter(table)}
    reader.node(fx, "embedding", [given["self"]], {"common": True}, parameters)


def _embedding_bag(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Bags of equal size, of tokens that lie side by side: the mean, sum or largest of their rows."""
    tokens, sums = given["indices"], ("sum", "mean", "amax")
    flat = (
        tokens.op == "call_function" and opname(tokens) in RESHAPES and len(reader.shape(tokens.args[0])) == 2
    )
    whole = reader.is_value(tokens) and flat and not reader.is_value(given["offsets"])
    even = whole and reader.shape(given["offsets"])[0] == reader.shape(tokens.args[0])[0]
    left_out = given.get("padding_idx") is not None and given["padding_idx"] >= 0
    if not even or left_out or given.get("per_sample_weights") is not None:
        raise reader.unknown(fx, "bags of other tokens than those of one input each, or without some of them")
    name = reader.name(fx, {})
    weight = {"weight": reader.parameter(given["weight"])}
    reader.add(Node(f"{name}_rows", "embedding", (reader.value(tokens.args[0]),), {}, weight))
    reader.add(Node(name, sums[given["mode"]], (f"{name}_rows",), {"dims": [1], "keepdim": False}))
    reader.names[fx] = name
    reader.parts[fx, 0] = lambda user: reader.same.__setitem__(user, fx)


def _each(value: Any, count: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * count if len(value) == 1 else value


MAPS = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "einsum": _einsum,
    "convolution": _convolution,
    "embedding": _embedding,
    "one_hot": _one_hot,
    "embedding_bag": _embedding_bag,
    **{name: partial(_convolve, name=name) for name in (*CONVOLUTIONS, *TRANSPOSED)},
}
