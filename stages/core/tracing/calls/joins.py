"""Elementwise calls: on one value, on two, on a value and a number or a parameter."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.fx

from stages.core.graph.nodes import Node
from stages.core.graph.operations import UNARY
from stages.core.tracing.reader import Reader

BINARY_CALLS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "true_divide": "divide",
    "subtract": "subtract",
    "multiply": "multiply", "divide": "divide", "maximum": "maximum", "minimum": "minimum",
}  # fmt: skip

NUMBERS = {"add": "shift", "subtract": "shift", "multiply": "scale", "divide": "divide_by"}
SPELLED = {
    "hardtanh_": "hardtanh",
    "log_sigmoid_forward": "log_sigmoid",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
}


def _elementwise(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    first, *rest = given
    defaults = {a.name: a.default_value for a in fx.target._schema.arguments if a.has_default_value()}
    settings = {k: given[k] for k in rest if given[k] is not None and given[k] != defaults.get(k)}
    if any(isinstance(v, torch.fx.Node) for v in settings.values()):
        raise reader.unknown(fx, f"{name} whose settings depend on a value")
    reader.node(fx, name, [given[first]], settings)


def binary(
    reader: Reader, fx: torch.fx.Node, name: str, given: Mapping[str, Any], called: str | None = None
) -> None:
    """called: the name of the node, by default that of the call."""
    a, b = given["self"], given["other"]
    if given.get("rounding_mode") is not None:
        raise reader.unknown(fx, f"{name} that rounds")
    alpha = given.get("alpha", 1)
    a, b = reader.number(a), reader.number(b)
    if isinstance(b, int | float) and reader.is_value(a):
        value = b * alpha
        reader.node(fx, NUMBERS[name], [a], {"value": -value if name == "subtract" else value}, name=called)
    elif isinstance(a, int | float) and reader.is_value(b):
        if name in ("add", "multiply"):
            reader.node(fx, NUMBERS[name], [b], {"value": a}, name=called)
        elif name == "subtract":
            reader.node(fx, "subtract_from", [b], {"value": a}, name=called)
        else:
            raise reader.unknown(fx, f"{name} of a number by a value")
    elif alpha != 1:
        raise reader.unknown(fx, f"{name} with alpha={alpha}")
    elif reader.is_value(a) and reader.is_value(b):
        reader.node(fx, name, [a, b], name=called)
    else:
        value, lone = (a, b) if reader.is_value(a) else (b, a)
        if len(reader.shape(lone)) > len(reader.shape(value)):
            raise reader.unknown(fx, f"{name} of a parameter that has more dimensions than the value")
        attributes = {"reverse": True} if value is b and name in ("subtract", "divide") else {}
        parameter, view = reader.seen(lone)
        if view:
            attributes["view"] = view
        reader.node(fx, f"{name}_parameter", [value], attributes, {"value": parameter}, called)


def _addcmul(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """self + value * tensor1 * tensor2, as its parts."""
    product, name = [given["tensor1"], given["tensor2"]], reader.name(fx, {})
    if not any(map(reader.is_value, product)):
        raise reader.unknown(fx, "addcmul of a value and the product of two parameters")
    binary(reader, fx, "multiply", {"self": product[0], "other": product[1]}, f"{name}_product")
    if given["value"] != 1:
        scaled = Node(f"{name}_scaled", "scale", (reader.names[fx],), {"value": given["value"]})
        reader.nodes.append(scaled)
        reader.taken.add(scaled.name)
        reader.names[fx] = scaled.name
    binary(reader, fx, "add", {"self": fx, "other": given["self"]}, name)


def _rsub(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    binary(
        reader,
        fx,
        "subtract",
        {"self": given["other"], "other": given["self"], "alpha": given.get("alpha", 1)},
    )


def _pow(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    exponent = reader.number(given.get("exponent"))
    if not isinstance(exponent, int | float) or not reader.is_value(given["self"]):
        raise reader.unknown(fx, "a power that depends on a value")
    reader.node(fx, "power", [given["self"]], {"value": exponent})


def _glu(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """The first half of a dimension times the sigmoid of the second."""
    source, name = reader.value(given["self"]), reader.name(fx, {})
    shape = reader.shape(given["self"])
    dim = given["dim"] % len(shape)
    half = shape[dim] // 2
    for i, start in enumerate((0, half)):
        cut = {"dim": dim, "start": start, "stop": start + half, "step": 1}
        reader.nodes.append(Node(f"{name}_{i}", "slice", (source,), cut))
    reader.nodes.append(Node(f"{name}_gate", "sigmoid", (f"{name}_1",)))
    reader.nodes.append(Node(name, "multiply", (f"{name}_0", f"{name}_gate")))
    reader.taken |= {name, f"{name}_0", f"{name}_1", f"{name}_gate"}
    reader.names[fx] = name


def _prelu(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reader.node(fx, "prelu", [given["self"]], {}, reader.roles(fx, given, {"weight": "weight"}))


def _local_response_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    settings = {key: given[key] for key in ("size", "alpha", "beta", "k")}
    reader.node(fx, "local_response_norm", [given["x"]], settings)


def _called(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    binary(reader, fx, name, given)


JOINS = {
    "addcmul": _addcmul,
    "rsub": _rsub,
    "pow": _pow,
    "glu": _glu,
    "prelu": _prelu,
    "local_response_norm": _local_response_norm,
    **{call: partial(_called, name=name) for call, name in BINARY_CALLS.items()},
    **{name: partial(_elementwise, name=name) for name in UNARY},
    **{call: partial(_elementwise, name=name) for call, name in SPELLED.items()},
}
