"""Attention, softmax, sums, pooling and resizing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.fx

from stages.core.graph.nodes import Node
from stages.core.graph.operations import ADAPTIVE, POOLS
from stages.core.tracing.bare import made_constant
from stages.core.tracing.calls.joins import binary
from stages.core.tracing.calls.moving import repeated
from stages.core.tracing.export import opname
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import RESHAPES, Reader

INTERPOLATION = {
    "upsample_nearest1d": "nearest", "upsample_nearest2d": "nearest", "upsample_nearest3d": "nearest",
    "upsample_linear1d": "linear", "upsample_bilinear2d": "bilinear", "upsample_bicubic2d": "bicubic",
    "upsample_trilinear3d": "trilinear", "_upsample_nearest_exact2d": "nearest-exact",
}  # fmt: skip


def _scaled_dot_product_attention(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    attributes = {k: given[k] for k in ("is_causal", "scale") if given.get(k)}
    inputs, mask, parameters = [given["query"], given["key"], given["value"]], given.get("attn_mask"), {}
    if mask is not None and reader.is_value(mask):
        inputs.append(mask)
    elif mask is not None:
        kind = given["query"].meta["val"].dtype
        parameters["mask"] = reader.parameter(_added(reader, mask, kind) if _is_bool(mask) else mask)
    own, heads = reader.name(fx, {}), reader.shape(inputs[0])[1:-2]
    values = [reader.value(own) for own in inputs]
    for i, role in ((1, "keys"), (2, "values")):
        shape = reader.shape(inputs[i])
        if given.get("enable_gqa") and shape[1] < heads[0]:  # fewer heads of keys and values than of queries
            repeated(reader, f"{own}_{role}", values[i], shape, 1, heads[0] // shape[1])
            values[i] = f"{own}_{role}"
    if len(values) > 3:
        values[3] = _unexpanded(reader, values[3])
    elif not parameters and len({tuple(reader.shape(own)[:-3]) for own in inputs}) == 1 < len(heads):
        attributes["windows"] = len(heads) - 1
    reader.add(Node(own, "attention", tuple(values), attributes, parameters), fx)
    reader.names[fx] = own


def _is_bool(mask: torch.fx.Node) -> bool:
    return mask.meta["val"].dtype == torch.bool


def _added(reader: Reader, mask: torch.fx.Node, kind: torch.dtype) -> torch.fx.Node:
    """A mask of what is attended to, as numbers that are added to the scores: what is kept of a trace is numbers."""
    aten = torch.ops.aten
    hidden = made_constant(reader, aten.to.dtype, made_constant(reader, aten.logical_not.default, mask), kind)
    return made_constant(reader, aten.mul.Scalar, hidden, -torch.finfo(kind).max / 64)


def _unexpanded(reader: Reader, mask: str) -> str:
    """A mask that is broadcast by attention itself: as it stands there, it says nothing of single heads."""
    made = next(node for node in reader.nodes if node.name == mask)
    return _unexpanded(reader, made.inputs[0]) if made.operation == "expand" else mask


def _softmax(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    rank = len(reader.shape(fx))
    reader.node(fx, "softmax", [given["self"]], {"dim": given["dim"] % rank - rank})


def _log_softmax(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reader.node(fx, "log_softmax", [given["self"]], {"dim": given["dim"]})


def reduce(
    reader: Reader,
    fx: torch.fx.Node,
    operation: str,
    given: Mapping[str, Any],
    name: str | None = None,
    **more: Any,
) -> None:
    """A reduction over some dimensions. name: of the node, by default that of the call. more: settings besides."""
    dims = given.get("dim")
    if dims is None or dims == []:
        raise reader.unknown(fx, f"{operation} over everything")
    dims = list(dims) if isinstance(dims, tuple | list) else [dims]
    if any(reader.shape(given["self"])[d] % INPUT == 0 for d in dims):
        raise reader.unknown(fx, f"{operation} over the images")
    rank = len(reader.shape(given["self"]))
    # counted from the last: a product may be given a dimension for its one head
    settings = {"dims": [d % rank - rank for d in dims], "keepdim": bool(given.get("keepdim", False)), **more}
    again = put_back(reader, fx, dims[0] % rank) if len(dims) == 1 and not name else []
    if again and not settings["keepdim"]:  # x.mean(1)[:, None]
        first, *others = again
        reader.node(first, operation, [given["self"]], {**settings, "keepdim": True})
        reader.same |= dict.fromkeys(others, first)
        reader.skipped |= set(again)
        return
    reader.node(fx, operation, [given["self"]], settings, name=name)


def put_back(reader: Reader, fx: torch.fx.Node, dim: int) -> list[torch.fx.Node]:
    """The readers of a call that drops a dimension, where all of them give its value one more, at ``dim``."""
    users, value = list(fx.users), fx.meta["val"]
    if isinstance(value, tuple | list):  # of a largest value and where it is, the value alone
        if any(user.args[1] != 0 for user in users):
            return []
        users, value = [own for user in users for own in user.users], value[0]
    wanted = [*value.shape[:dim], 1, *value.shape[dim:]]
    alike = all(opname(own) in RESHAPES and list(own.meta["val"].shape) == wanted for own in users)
    return users if alike else []


def _correction(given: Mapping[str, Any]) -> int | float:
    """What is taken from the number of values that a variance is over."""
    if "unbiased" in given:
        return int(given["unbiased"])
    return 1 if given.get("correction") is None else given["correction"]


def _var(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reduce(reader, fx, "var", given, correction=_correction(given))


def _std(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    name = reader.name(fx, {})
    reduce(reader, fx, "var", given, f"{name}_squared", correction=_correction(given))
    reader.add(Node(name, "sqrt", (f"{name}_squared",)))
    reader.names[fx] = name


def _var_mean(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reader.parts[fx, 0] = lambda user: reduce(reader, user, "var", given, correction=_correction(given))
    reader.parts[fx, 1] = lambda user: reduce(reader, user, "mean", given)


def _mean(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reduce(reader, fx, "mean", given)


def _sum(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reduce(reader, fx, "sum", given)


def _amax(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reduce(reader, fx, "amax", given)


def _amin(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reduce(reader, fx, "amin", given)


def _max(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    if "other" in given:
        binary(reader, fx, "maximum", given)
    elif "dim" in given:
        reduce(reader, fx, "amax", given)
        reader.parts[fx, 0] = lambda user: reader.same.__setitem__(user, fx)
    else:
        raise reader.unknown(fx, "max over everything")


def _min(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    if "dim" not in given:
        raise reader.unknown(fx, "min over everything")
    reduce(reader, fx, "amin", given)
    reader.parts[fx, 0] = lambda user: reader.same.__setitem__(user, fx)


def _pool(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    first = next(iter(given))
    settings = {k: _plain(v) for k, v in given.items() if k != first}
    if name in ADAPTIVE:
        settings = {"output_size": settings["output_size"]}
    else:
        settings["stride"] = settings.get("stride") or settings["kernel_size"]
        settings = {k: v for k, v in settings.items() if v is not None}
    reader.node(fx, name, [given[first]], settings)
    if isinstance(fx.meta["val"], tuple | list):
        reader.parts[fx, 0] = lambda user: reader.same.__setitem__(user, fx)


def _max_pool2d_with_indices(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _pool(reader, fx, given, "max_pool2d")


def _interpolate(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], mode: str) -> None:
    settings: dict[str, Any] = {"mode": mode}
    factors = given.get("scale_factors")
    if factors:
        settings["scale_factor"] = list(factors)
    else:
        settings["size"] = reader.shape(fx)[2:]
    if given.get("align_corners"):
        settings["align_corners"] = True
    reader.node(fx, "interpolate", [given.get("input", given.get("self"))], settings)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


REDUCTION_CALLS = {
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "var": _var,
    "std": _std,
    "var_mean": _var_mean,
    "mean": _mean,
    "sum": _sum,
    "amax": _amax,
    "max": _max,
    "amin": _amin,
    "min": _min,
    "max_pool2d_with_indices": _max_pool2d_with_indices,
    **{name: partial(_pool, name=name) for name in (*POOLS, *ADAPTIVE)},
    **{call: partial(_interpolate, mode=mode) for call, mode in INTERPOLATION.items()},
}
