"""What looks along places: running sums, sorting, picking by rank, sampling of maps."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.tracing.bare import made_constant, unexpanded
from stages.core.tracing.calls.reductions import reduce
from stages.core.tracing.export import opname
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import Reader


def _along(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    """Along one dimension that counts no images; of a call that gives several, the first."""
    _first(reader, fx, name, given["self"], {"dim": _dim(reader, fx, given)})


def _dim(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> int:
    shape = reader.shape(given["self"])
    dim = given["dim"] % len(shape)
    if shape[dim] % INPUT == 0:
        raise reader.unknown(fx, "a call along the images")
    return dim - len(shape)  # from the end: what is ahead may get one more, of parts


def _first(
    reader: Reader, fx: torch.fx.Node, name: str, source: torch.fx.Node, settings: dict[str, Any]
) -> None:
    if isinstance(fx.meta["val"], tuple | list):
        reader.parts[fx, 0] = lambda user: reader.node(user, name, [source], settings)
    else:
        reader.node(fx, name, [source], settings)


def _sorted(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    settings = {"dim": _dim(reader, fx, given), "descending": bool(given.get("descending")), "stable": True}
    _first(reader, fx, name, given["self"], settings)
    reader.parts[fx, 1] = lambda user: reader.node(user, "argsort", [given["self"]], settings)


def _topk(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    settings = {"k": given["k"], "dim": _dim(reader, fx, given), "largest": bool(given["largest"])}
    for i, name in enumerate(("topk", "topk_index")):
        reader.parts[fx, i] = lambda user, name=name: reader.node(user, name, [given["self"]], settings)


def _argmax(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], descending: bool) -> None:
    """The first place of a sorted list."""
    if given.get("dim") is None:
        raise reader.unknown(fx, f"{opname(fx)} over all dimensions")
    dim, own = _dim(reader, fx, given), reader.name(fx, {})
    settings = {"dim": dim, "descending": descending, "stable": True}
    reader.node(fx, "argsort", [given["self"]], settings, name=f"{own}_order")
    at = dim + len(reader.shape(given["self"]))
    name, where = (
        ("slice", {"start": 0, "stop": 1, "step": 1}) if given.get("keepdim") else ("select", {"index": 0})
    )
    reader.add(Node(own, name, (f"{own}_order",), {"dim": at, **where}), fx)
    reader.names[fx] = own


def _triangle(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    reader.node(fx, name, [given["self"]], {"diagonal": given["diagonal"]})


def _gather(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """By an index that depends on the input, or by one that is the same for all images."""
    index, dim = given["index"], _dim(reader, fx, given) + len(reader.shape(given["self"]))
    if not reader.is_value(given["self"]):
        reader.same[fx] = _alike(reader, fx, given["self"], dim)
        return
    if reader.is_value(index):
        one, settings = _one_for_all(reader, index), {"dim": dim}
        if one is not None:
            settings["wide"] = [n == 1 and d not in (0, dim) for d, n in enumerate(reader.shape(one))]
        reader.node(fx, "gather", [given["self"], index if one is None else one], settings)
        return
    table = unexpanded(reader, index)
    if reader.shape(table)[0] > 1:
        raise reader.unknown(fx, "gather by an index that differs from image to image, and is constant")
    # as numbers, as whatever is kept
    places = made_constant(reader, torch.ops.aten.to.dtype, table, torch.float32)
    wide = [n == 1 and d not in (0, dim) for d, n in enumerate(reader.shape(table))]
    reader.node(fx, "gather", [given["self"], places], {"dim": dim, "wide": wide})


def _scatter(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Values, or a number, at places that depend on the input (the largest gates'), another number elsewhere."""
    index, written, dim = given["index"], given.get("src", given.get("value")), _dim(reader, fx, given)
    elsewhere = reader.one_number(given["self"])
    number = isinstance(written, int | float)
    kept = [n for d, n in enumerate(reader.shape(fx)) if d != dim % len(reader.shape(fx))]
    there = [n for d, n in enumerate(reader.shape(index)) if d != dim % len(reader.shape(fx))]
    fits = kept == there and (number or reader.shape(written) == reader.shape(index))
    if not fits or isinstance(elsewhere, torch.fx.Node) or given.get("reduce") or not reader.is_value(index):
        raise reader.unknown(fx, "values written at places that are constant, or over other values")
    settings = {"dim": dim, "size": reader.shape(fx)[dim], "fill": float(elsewhere)}
    values = [index] if number else [written, index]
    reader.node(fx, "scatter", values, settings | ({"value": float(written)} if number else {}))


def _alike(reader: Reader, fx: torch.fx.Node, table: torch.fx.Node, dim: int) -> torch.fx.Node:
    """What any index takes of a constant whose entries are all one number (kinds of tokens, of RoBERTa)."""
    held, wanted = reader.folding.value(reader.through(table), reader.module), reader.shape(fx)
    there = zip(reader.shape(table), wanted, strict=True)
    fits = all(n >= m if d == dim else n == m for d, (n, m) in enumerate(there))
    if not fits or not isinstance(held, Tensor) or len(held.unique()) != 1:
        raise reader.unknown(fx, "gather of a constant")
    return made_constant(reader, torch.ops.aten.slice.Tensor, table, dim, 0, wanted[dim])


def _one_for_all(reader: Reader, index: torch.fx.Node) -> torch.fx.Node | None:
    """What was only repeated along dimensions of one entry to be an index."""
    index = reader.through(index)
    if index.op != "call_function" or opname(index) not in ("expand", "repeat"):
        return None
    before, after = reader.shape(index.args[0]), reader.shape(index)
    kept = len(before) == len(after) and all(n in (1, m) for n, m in zip(before, after, strict=True))
    return index.args[0] if kept and before[0] == after[0] else None


def _ranked(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    """The middle value of a dimension, or that of a rank."""
    if "dim" not in given:
        raise reader.unknown(fx, f"{name} over everything")
    more = {"k": given["k"]} if "k" in given else {}
    reader.parts[fx, 0] = lambda user: reduce(reader, user, name, given, **more)


def _reduced(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    reduce(reader, fx, name, given)


def _ends(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    for i, name in enumerate(("amin", "amax")):
        reader.parts[fx, i] = lambda user, name=name: reduce(reader, user, name, given)


def _grid_sampler(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    settings = {
        "mode": ("bilinear", "nearest", "bicubic")[given["interpolation_mode"]],
        "padding_mode": ("zeros", "border", "reflection")[given["padding_mode"]],
        "align_corners": bool(given["align_corners"]),
    }
    reader.node(fx, "grid_sample", [given["input"], given["grid"]], settings)


def _affine_grid(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    size = reader.shape(fx)[1:-1]
    settings = {"size": [1, *size], "align_corners": bool(given["align_corners"])}
    reader.node(fx, "affine_grid", [given["theta"]], settings)


def _fourier_part(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """One part of a transform (stages.core.tracing.complex_pairs)."""
    if any(reader.shape(given["real"])[d] % INPUT == 0 for d in given["dims"]):
        raise reader.unknown(fx, "a transform of the images")
    settings = {key: given[key] for key in ("kind", "dims", "norm", "part")}
    parts = [given["real"], *([] if given["imaginary"] is None else [given["imaginary"]])]
    reader.node(fx, "fourier", parts, {**settings, "sizes_over": given["sizes"]})


LINE_CALLS = {
    "fourier": _fourier_part,
    **{
        name: partial(_along, name=name) for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
    },
    "sort": partial(_sorted, name="sort"),
    "argsort": partial(_sorted, name="argsort"),
    "topk": _topk,
    "argmax": partial(_argmax, descending=True),
    "argmin": partial(_argmax, descending=False),
    "tril": partial(_triangle, name="tril"),
    "triu": partial(_triangle, name="triu"),
    "gather": _gather,
    "scatter": _scatter,
    "median": partial(_ranked, name="median"),
    "kthvalue": partial(_ranked, name="kthvalue"),
    "prod": partial(_reduced, name="prod"),
    "logsumexp": partial(_reduced, name="logsumexp"),
    "any": partial(_reduced, name="amax"),
    "all": partial(_reduced, name="amin"),
    "aminmax": _ends,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _grid_sampler),
    "affine_grid_generator": _affine_grid,
}
