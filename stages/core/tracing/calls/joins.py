"""Elementwise calls: on one value, on two, on a value and a number or a parameter."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.fx

from stages.core.graph.nodes import Node
from stages.core.graph.operations import COMPARISONS, ROUNDING, UNARY
from stages.core.tracing.reader import Reader, images_at

BINARY_CALLS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "true_divide": "divide",
    "subtract": "subtract",
    "multiply": "multiply", "divide": "divide", "maximum": "maximum", "minimum": "minimum", "fmax": "maximum",
    "fmin": "minimum", "remainder": "remainder", "fmod": "fmod", "floor_divide": "floor_divide", "atan2": "atan2",
    "arctan2": "atan2", "hypot": "hypot", "copysign": "copysign",
}  # fmt: skip

SPELLED_COMPARISONS = {
    **{name: name for name in COMPARISONS}, "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "not_equal": "ne",
}  # fmt: skip
NUMBERS = {
    **{name: f"{name}_number" for name in (*COMPARISONS, *ROUNDING)},
    "add": "shift",
    "subtract": "shift",
    "multiply": "scale",
    "divide": "divide_by",
    "raise": "power",
}
SPELLED = {
    "hardtanh_": "hardtanh",
    "log_sigmoid_forward": "log_sigmoid",
    "negative": "neg",
    "absolute": "abs",
    "arctan": "atan",
    "arcsin": "asin",
    "arccos": "acos",
    "fix": "trunc",
    "special_expit": "sigmoid",
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
        _rounded(reader, fx, given)
        return
    alpha = given.get("alpha", 1)
    a, b = reader.number(a), reader.number(b)
    if isinstance(b, int | float) and reader.is_value(a):
        if name not in NUMBERS:
            raise reader.unknown(fx, f"{name} with a number")
        value = b * alpha
        reader.node(fx, NUMBERS[name], [a], {"value": -value if name == "subtract" else value}, name=called)
    elif isinstance(a, int | float) and reader.is_value(b):
        if name in ("add", "multiply"):
            reader.node(fx, NUMBERS[name], [b], {"value": a}, name=called)
        elif name == "subtract":
            reader.node(fx, "subtract_from", [b], {"value": a}, name=called)
        elif name == "raise":
            reader.node(fx, "power_of", [b], {"value": a}, name=called)
        else:
            raise reader.unknown(fx, f"{name} of a number by a value")
    elif alpha != 1 and reader.is_value(b):
        own = called or reader.name(fx, {})
        reader.node(fx, "scale", [b], {"value": alpha}, name=f"{own}_scaled")
        binary(reader, fx, name, {"self": given["self"], "other": fx}, own)
    elif alpha != 1:
        raise reader.unknown(fx, f"{name} with alpha={alpha}")
    elif reader.is_value(a) and reader.is_value(b):
        reader.node(fx, name, [a, b], name=called)
    else:
        value, lone = (a, b) if reader.is_value(a) else (b, a)
        if len(reader.shape(lone)) > len(reader.shape(value)):
            if images_at(lone.meta["val"]) is None:
                raise reader.unknown(fx, f"{name} of a parameter that has more dimensions than the value")
            reader.node(fx, name, [a, b], name=called)  # of a constant that is given images, as a first state
            return
        attributes = {"reverse": True} if value is b and name in ("subtract", "divide") else {}
        parameter, view = reader.seen(lone)
        if view:
            attributes["view"] = view
        reader.node(fx, f"{name}_parameter", [value], attributes, {"value": parameter}, called)


def _rounded(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """A quotient that is rounded down, or towards zero."""
    if given["rounding_mode"] == "floor":
        binary(reader, fx, "floor_divide", {"self": given["self"], "other": given["other"]})
        return
    name = reader.name(fx, {})
    binary(reader, fx, "divide", {"self": given["self"], "other": given["other"]}, f"{name}_quotient")
    reader.add(Node(name, "trunc", (reader.names[fx],)))
    reader.names[fx] = name


def _clamp(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    """Between numbers, or between values."""
    bounds = {key: reader.number(given.get(key)) for key in ("min", "max")}
    if not any(isinstance(bound, torch.fx.Node) for bound in bounds.values()):
        _elementwise(reader, fx, {key: bounds.get(key, own) for key, own in given.items()}, name)
        return
    value, own = given["self"], reader.name(fx, {})
    steps = [("maximum", bounds["min"]), ("minimum", bounds["max"])]
    steps = [(name, bound) for name, bound in steps if bound is not None]
    if any(not isinstance(bound, torch.fx.Node) for _, bound in steps):
        raise reader.unknown(fx, "clamp between a number and a value")
    for i, (name, bound) in enumerate(steps):
        binary(
            reader, fx, name, {"self": value, "other": bound}, own if i == len(steps) - 1 else f"{own}_{name}"
        )
        value = fx


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
    binary(reader, fx, "raise", {"self": given["self"], "other": given["exponent"]})


def _where(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """By a condition that depends on the input, or by a mask."""
    condition, sides = given["condition"], {"true": given["self"], "false": given["other"]}
    found = {role: reader.one_number(side) for role, side in sides.items()}
    numbers = {role: side for role, side in found.items() if isinstance(side, int | float)}
    values = [side for side in found.values() if reader.is_value(side)]
    if len(numbers) + len(values) < 2:
        raise reader.unknown(fx, "where with a tensor that does not depend on the input")
    if reader.is_value(condition):
        whole = {"integers": True} if _of_integers(condition) else {}
        reader.node(fx, "where", [condition, *values], numbers | whole)
    elif not numbers:
        _of_two(reader, fx, condition, *values)
    else:
        ((role, number),) = numbers.items()
        _fill(reader, fx, values[0], condition, number, role == "true")


def _of_integers(condition: torch.fx.Node) -> bool:
    """Whether what decides is whole numbers: tokens that are compared."""
    stack, kinds = [condition], set()
    while stack:
        node = stack.pop()
        if node.meta["val"].dtype == torch.bool and node.op == "call_function":
            stack += node.all_input_nodes
        else:
            kinds.add(node.meta["val"].is_floating_point())
    return kinds == {False}


def _of_two(
    reader: Reader, fx: torch.fx.Node, mask: torch.fx.Node, a: torch.fx.Node, b: torch.fx.Node
) -> None:
    """One value where a mask is true, another where it is not: the sum of both, each times one or zero."""
    held, own = reader.folding.value(reader.through(mask), reader.module), reader.name(fx, {})
    if bool(held.all()) or not bool(held.any()):
        reader.same[fx] = a if bool(held.all()) else b
        return
    names = []
    for side, value in ((True, a), (False, b)):
        _fill(reader, fx, value, mask, 0.0, not side, f"{own}_{str(side).lower()}")
        names.append(reader.names[fx])
    reader.add(Node(own, "add", tuple(names)))
    reader.names[fx] = own


def _masked_fill(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    sides = {"condition": given["mask"], "self": given["value"], "other": given["self"]}
    _where(reader, fx, sides)


def _index_put(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Numbers or values in the place of those that a mask of the same shape says: `y[y < 0] = 0`."""
    indices = [own for own in given["indices"] if own is not None]
    masked = len(indices) == 1 and len(given["indices"]) == 1 and indices[0].meta["val"].dtype == torch.bool
    if not masked or reader.shape(indices[0]) != reader.shape(given["self"]) or given.get("accumulate"):
        raise reader.unknown(fx, "values written at places that are given one by one")
    if isinstance(reader.number(given["values"]), torch.fx.Node):
        raise reader.unknown(fx, "several values written where a mask says")
    _where(reader, fx, {"condition": indices[0], "self": given["values"], "other": given["self"]})


def _fill(
    reader: Reader,
    fx: torch.fx.Node,
    value: torch.fx.Node,
    mask: torch.fx.Node,
    number: float,
    where: bool,
    called: str | None = None,
) -> None:
    """A number in a value's place wherever a mask says ``where``. called: the node's name, by default the call's."""
    if len(reader.shape(mask)) > len(reader.shape(value)):
        raise reader.unknown(fx, "a mask that has more dimensions than the value")
    with reader.graph.inserting_before(fx):
        call = torch.ops.aten.ne if where else torch.ops.aten.eq
        ones = reader.graph.call_function(call.Scalar, (mask, 0))
        ones.meta["val"] = mask.meta["val"].bool()
    reader.known.add(ones)
    reader.node(fx, "fill_parameter", [value], {"fill": number}, {"value": reader.parameter(ones)}, called)


def _not(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Of a comparison, which is one or zero."""
    reader.node(fx, "eq_number", [given["self"]], {"value": 0})


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


def _rrelu(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """As it is evaluated: with the mean of its slopes."""
    if given["training"]:
        raise reader.unknown(fx, "rrelu in training mode")
    slope = (given["lower"] + given["upper"]) / 2
    reader.node(fx, "leaky_relu", [given["self"]], {"negative_slope": slope})


def _called(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    binary(reader, fx, name, given)


JOINS = {
    "addcmul": _addcmul,
    "rsub": _rsub,
    "pow": _pow,
    "where": _where,
    "masked_fill": _masked_fill,
    "logical_not": _not,
    "bitwise_not": _not,
    **{name: partial(_called, name="multiply") for name in ("logical_and", "bitwise_and", "and")},
    **{name: partial(_called, name="maximum") for name in ("logical_or", "bitwise_or", "or")},
    "glu": _glu,
    "prelu": _prelu,
    "rrelu": _rrelu,
    **{call: partial(_called, name=name) for call, name in (BINARY_CALLS | SPELLED_COMPARISONS).items()},
    **{name: partial(_elementwise, name=name) for name in UNARY},
    **{call: partial(_elementwise, name=name) for call, name in SPELLED.items()},
    **{
        name: partial(_clamp, name=name.replace("clip", "clamp"))
        for name in ("clamp", "clip", "clamp_min", "clamp_max")
    },
    "index_put": _index_put,
}
