"""What takes some of the places of a dimension, adds places or changes their order."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.tracing.calls.moving import reshaped
from stages.core.tracing.calls.reductions import put_back
from stages.core.tracing.export import opname
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import Reader
from stages.core.tracing.rearranging import Factors

EMPTY = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_permuted",
)  # whose entries are nobody's until they are written


def _slice(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    size = reader.shape(given["self"])[given["dim"]]
    start, stop, _ = slice(given["start"], given["end"]).indices(size)
    _cut(reader, fx, given["self"], given["dim"], start, stop, given["step"])


def _narrow(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    start = given["start"]
    _cut(reader, fx, given["self"], given["dim"], start, start + given["length"], 1)


def _cut(
    reader: Reader, fx: torch.fx.Node, source: torch.fx.Node, dim: int, start: int, stop: int, step: int
) -> None:
    shape = reader.shape(source)
    dim %= len(shape)
    if (start, stop, step) == (0, shape[dim], 1):
        reader.same[fx] = source
    elif shape[dim] % INPUT == 0:
        raise reader.unknown(fx, "a part of the images")
    else:
        reader.node(fx, "slice", [source], {"dim": dim, "start": start, "stop": stop, "step": step})


def _select(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    shape = reader.shape(given["self"])
    dim = given["dim"] % len(shape)
    if shape[dim] % INPUT == 0:
        raise reader.unknown(fx, "one of the images")
    index = given["index"] % shape[dim]
    again = put_back(reader, fx, dim) if dim else []
    if again:  # x[:, 0].unsqueeze(1)
        first, *others = again
        reader.same |= dict.fromkeys(others, first)
        reader.skipped |= set(again)
        _cut(reader, first, given["self"], dim, index, index + 1, 1)
        return
    if dim == len(shape) - 1 > 1 == shape[dim]:  # y[..., 0] of one score
        reshaped(reader, fx, given)
        return
    reader.node(fx, "select", [given["self"]], {"dim": dim, "index": index})


def _split(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    source, dim = given["self"], given["dim"]
    size = reader.shape(source)[dim]
    sizes = given.get("split_size", given.get("split_sizes"))
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    start = 0
    for i, own in enumerate(sizes):
        reader.parts[fx, i] = lambda user, s=start, n=own: _cut(reader, user, source, dim, s, s + n, 1)
        start += own


def _chunk(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    size = reader.shape(given["self"])[given["dim"]]
    _split(
        reader,
        fx,
        {"self": given["self"], "dim": given["dim"], "split_size": math.ceil(size / given["chunks"])},
    )


def _unbind(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    for i in range(len(fx.meta["val"])):
        reader.parts[fx, i] = lambda user, i=i: _select(
            reader, user, {"self": given["self"], "dim": given["dim"], "index": i}
        )


def _getitem(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    make = reader.parts.get((fx.args[0], fx.args[1]))
    if make is None:
        if fx.users:
            raise reader.unknown(fx, f"output {fx.args[1]} of {opname(fx.args[0])}")
        return
    make(fx)


def _index(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    picked = [i for i, index in enumerate(given["indices"]) if index is not None]
    if len(picked) != 1 or reader.is_value(given["indices"][picked[0]]) or picked[0] == 0:
        raise reader.unknown(fx, "an index that is not one list of places")
    _pick(
        reader,
        fx,
        given["self"],
        picked[0],
        reader.folding.value(reader.through(given["indices"][picked[0]]), reader.module),
    )


def _index_select(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    if reader.is_value(given["index"]):
        raise reader.unknown(fx, "an index that depends on a value")
    index = reader.folding.value(reader.through(given["index"]), reader.module)
    _pick(reader, fx, given["self"], given["dim"] % len(reader.shape(fx)), index)


def _pick(reader: Reader, fx: torch.fx.Node, source: torch.fx.Node, dim: int, index: Tensor) -> None:
    """By a list of places, or by a table of them (neighbours of each): one list, then taken apart."""
    shape = reader.shape(source)
    if index.dtype == torch.bool or shape[dim] % INPUT == 0:
        raise reader.unknown(fx, "an index that is not one list of places")
    own, places = reader.name(fx, {}), [int(i) % shape[dim] for i in index.flatten()]
    line = own if index.dim() == 1 else f"{own}_places"
    reader.node(fx, "pick", [source], {"dim": dim, "index": places}, name=line)
    if index.dim() != 1:
        factors = Factors.of([len(places) if d == dim else n for d, n in enumerate(shape)])
        factors.reshape([*shape[:dim], *index.shape, *shape[dim + 1 :]])
        reader.add(Node(own, "rearrange", (line,), factors.attributes()))
        reader.names[fx] = own


def _pad(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    pad, mode, value = list(given["pad"]), given.get("mode", "constant"), given.get("value")
    if not any(pad):
        reader.same[fx] = given["self"]
        return
    extra = {"mode": mode} if mode != "constant" else {}
    extra |= {"value": value} if value else {}
    reader.node(fx, "pad", [given["self"]], {"pad": pad, **extra})


def _constant_pad_nd(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _pad(reader, fx, given)


def _mode_pad(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], mode: str) -> None:
    _pad(reader, fx, {"self": given["self"], "pad": given["padding"], "mode": mode})


def _reflection_pad2d(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _mode_pad(reader, fx, given, "reflect")


def _replication_pad2d(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _mode_pad(reader, fx, given, "replicate")


def _unfold(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Windows of one dimension as a new last one: their places picked one after the other, then taken apart."""
    shape, size, step = reader.shape(given["self"]), given["size"], given["step"]
    dim = given["dimension"] % len(shape)
    if shape[dim] % INPUT == 0:
        raise reader.unknown(fx, "windows of the images")
    starts = range(0, shape[dim] - size + 1, step)
    index, own, value = [s + i for s in starts for i in range(size)], reader.name(fx, {}), given["self"]
    value = reader.value(value)
    if index != list(range(shape[dim])):
        reader.add(Node(f"{own}_places", "pick", (value,), {"dim": dim, "index": index}))
        value = f"{own}_places"
    factors = Factors.of([len(index) if d == dim else n for d, n in enumerate(shape)])
    factors.reshape([*shape[:dim], len(starts), size, *shape[dim + 1 :]])
    order = list(range(len(shape) + 1))
    factors.permute([*order[: dim + 1], *order[dim + 2 :], dim + 1])
    reader.add(Node(own, "rearrange", (value,), factors.attributes()))
    reader.names[fx] = own


def _roll(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    dims = list(given["dims"])
    if not dims or any(reader.shape(fx)[d] % INPUT == 0 for d in dims):
        raise reader.unknown(fx, "a roll of the images")
    reader.node(fx, "roll", [given["self"]], {"shifts": list(given["shifts"]), "dims": dims})


def _flip(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    reader.node(fx, "flip", [given["self"]], {"dims": list(given["dims"])})


def _expand(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    before, after = reader.shape(given["self"]), reader.shape(fx)
    ahead = len(after) - len(before)
    sizes = [n if i < ahead or before[i - ahead] != n else -1 for i, n in enumerate(after)]
    if all(n == -1 for n in sizes):
        reader.same[fx] = given["self"]
    elif any(n != -1 and n % INPUT == 0 for n in sizes):  # of a parameter: then it is a value
        raise reader.unknown(fx, "a value repeated over images")
    else:
        reader.node(fx, "expand", [given["self"]], {"sizes": sizes})


def _repeat(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Copies side by side along the dimensions of the value."""
    times, shape = list(given.get("repeats", given.get("dims"))), reader.shape(given["self"])
    if len(times) != len(shape) or times[0] != 1:
        raise reader.unknown(fx, "a value repeated over images or over new dimensions")
    sizes = [n if n > 1 and own == 1 else -1 for n, own in zip(times, shape, strict=True)]
    steps = [("concatenate", {"dim": d}, n) for d, n in enumerate(times) if n > 1 and sizes[d] == -1]
    if any(n != -1 for n in sizes):
        steps.insert(0, ("expand", {"sizes": sizes}, 1))
    if not steps:
        reader.same[fx] = given["self"]
        return
    own, value = reader.name(fx, {}), reader.value(given["self"])
    for i, (operation, attributes, copies) in enumerate(steps):
        name = own if i == len(steps) - 1 else f"{own}_{i}"
        reader.add(Node(name, operation, (value,) * copies, attributes))
        value = name
    reader.names[fx] = own


def _copy(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """What is written over a value takes its place."""
    if reader.shape(given["self"]) != reader.shape(given["src"]):
        raise reader.unknown(fx, "a value written over one of another shape")
    reader.same[fx] = given["src"]
    if not reader.is_value(given["src"]):
        reader.known.add(fx)


def _slice_scatter(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """A value written over a part of another (`y[:, :8] = ...`), or into zeros."""
    base, part, shape = given["self"], given["src"], reader.shape(given["self"])
    dim = given["dim"] % len(shape)
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(shape[dim])
    if (start, stop, step) == (0, shape[dim], 1):
        reader.same[fx] = part
        if not reader.is_value(part):
            reader.known.add(fx)
        return
    if step != 1 or shape[dim] % INPUT == 0:
        raise reader.unknown(fx, "a value written over every other place, or over images")
    if not reader.is_value(base):
        made = reader.through(base)
        zeros = opname(made) in EMPTY or not bool((reader.folding.value(made, reader.module) != 0).any())
        if not zeros or reader.from_parameters(made):
            raise reader.unknown(fx, "a value written into a constant other than zeros")
        behind = len(shape) - 1 - dim
        _pad(reader, fx, {"self": part, "pad": [0, 0] * behind + [start, shape[dim] - stop]})
        return
    own, value, parts = reader.name(fx, {}), reader.value(base), []
    for end, (first, last) in (("before", (0, start)), ("behind", (stop, shape[dim]))):
        if first < last:
            cut = {"dim": dim, "start": first, "stop": last, "step": 1}
            reader.add(Node(f"{own}_{end}", "slice", (value,), cut))
            parts.append(f"{own}_{end}")
    if not reader.is_value(part):
        raise reader.unknown(fx, "a constant written over a part of a value")
    parts.insert(1 if start else 0, reader.value(part))
    reader.add(Node(own, "concatenate", tuple(parts), {"dim": dim}))
    reader.names[fx] = own


PLACES = {
    "repeat": _repeat,
    "tile": _repeat,
    "copy": _copy,
    "slice_scatter": _slice_scatter,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "getitem": _getitem,
    "index": _index,
    "index_select": _index_select,
    "pad": _pad,
    "constant_pad_nd": _constant_pad_nd,
    "reflection_pad1d": _reflection_pad2d,
    "reflection_pad2d": _reflection_pad2d,
    "reflection_pad3d": _reflection_pad2d,
    "replication_pad1d": _replication_pad2d,
    "replication_pad2d": _replication_pad2d,
    "replication_pad3d": _replication_pad2d,
    "unfold": _unfold,
    "roll": _roll,
    "flip": _flip,
    "expand": _expand,
    "expand_as": _expand,
}
