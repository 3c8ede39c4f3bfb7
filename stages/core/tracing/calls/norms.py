"""Norms."""

from collections.abc import Mapping
from typing import Any

import torch.fx

from stages.core.tracing.calls.reductions import reduce
from stages.core.tracing.export import opname
from stages.core.tracing.reader import Reader


def _batch_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    roles = {
        "weight": "weight",
        "bias": "bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
    }
    _any_batch_norm(reader, fx, given, reader.roles(fx, given, roles))


def _any_batch_norm(
    reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], parameters: dict[str, str]
) -> None:
    if "running_mean" in parameters and given.get("training"):
        raise reader.unknown(fx, "batch norm on the statistics of the batch")
    if "running_mean" in parameters and ("weight" in parameters) != ("bias" in parameters):
        raise reader.unknown(fx, "batch norm with a weight or a bias alone")
    operation = "batch_norm" if "running_mean" in parameters else "batch_statistics"
    _first(reader, fx, operation, [given["input"]], {"eps": given["eps"]}, parameters)


def _instance_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    if not given["use_input_stats"]:  # on running statistics it is a batch norm
        _batch_norm(reader, fx, given)
        return
    parameters = reader.roles(fx, given, {"weight": "weight", "bias": "bias"})
    groups = reader.shape(given["input"])[1]
    reader.node(fx, "group_norm", [given["input"]], {"groups": groups, "eps": given["eps"]}, parameters)


def _group_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    parameters = reader.roles(fx, given, {"weight": "weight", "bias": "bias"})
    groups = given.get("num_groups", given.get("group"))
    _first(reader, fx, "group_norm", [given["input"]], {"groups": groups, "eps": given["eps"]}, parameters)


def _layer_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    parameters = reader.roles(fx, given, {"weight": "weight", "bias": "bias"})
    rank = len(given["normalized_shape"])
    attributes = {"eps": given["eps"]} | ({"rank": rank} if rank > 1 else {})
    _first(reader, fx, "layer_norm", [given["input"]], attributes, parameters)


def _first(reader: Reader, fx: torch.fx.Node, *node: Any) -> None:
    """A call that may give a tuple, of which the first is the value."""
    reader.node(fx, *node)
    if isinstance(fx.meta["val"], tuple | list):
        reader.parts[fx, 0] = lambda user: reader.same.__setitem__(user, fx)


def _linalg_vector_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """F.normalize: x / max(|x|, eps), as one operation. Any other length is a reduction."""
    dims, low = given.get("dim"), next(iter(fx.users), None)
    at = low.users if low is not None and opname(low) in ("clamp_min", "clamp") else {}
    wide = next(iter(at), None)
    quotient = next(iter(wide.users), None) if wide is not None and opname(wide) == "expand" else wide
    fits = (
        given["ord"] == 2 and dims is not None and len(dims) == 1 and given["keepdim"]
        and len(fx.users) == 1 and len(at) == 1 and quotient is not None and opname(quotient) == "div"
        and reader.through(quotient.args[0]) is reader.through(given["self"])
    )  # fmt: skip
    if fits:
        reader.node(quotient, "normalize", [given["self"]], {"dim": dims[0], "eps": float(low.args[1])})
        reader.skipped |= {low, wide, quotient}
    else:
        _length(reader, fx, given, given["ord"])


def _length(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], order: Any) -> None:
    if not isinstance(order, int | float):
        raise reader.unknown(fx, f"a norm of order {order}")
    reduce(reader, fx, "length", given, **({} if order == 2 else {"order": float(order)}))


def _linalg_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    dims, order = given.get("dim"), given.get("ord", given.get("p"))
    lone = isinstance(dims, int) or (dims is not None and len(dims) == 1)
    squares = order in (None, "fro") or (order == 2 and lone)
    _length(reader, fx, given, 2 if squares else f"{order}, of matrices")


def _local_response_norm(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    settings = {key: given[key] for key in ("size", "alpha", "beta", "k")}
    reader.node(fx, "local_response_norm", [given["x"]], settings)


NORM_CALLS = {
    "local_response_norm": _local_response_norm,
    "batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_legit_no_training": _batch_norm,
    "native_batch_norm_legit": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "native_group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "linalg_vector_norm": _linalg_vector_norm,
    "linalg_norm": _linalg_norm,
}
