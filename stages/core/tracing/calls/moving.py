"""What moves whole entries about, puts values side by side, or passes them on."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx

from stages.core.graph.nodes import Node
from stages.core.tracing.bare import unexpanded
from stages.core.tracing.export import opname
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.permuting import PERMUTES, order_of
from stages.core.tracing.reader import RESHAPES, Reader
from stages.core.tracing.rearranging import Factors


def _rearrange(reader: Reader, fx: torch.fx.Node, order: Sequence[int] | None) -> None:
    source = reader.through(fx.args[0])
    shape = reader.shape(fx)
    base, factors = reader.factors.get(source, (source, Factors.of(reader.shape(source))))
    for base, factors in ((base, factors.copy()), (source, Factors.of(reader.shape(source)))):  # noqa: B020
        if order is not None:
            factors.permute(order)
        elif not factors.reshape(shape):
            continue
        reader.factors[fx] = (base, factors)
        return
    if order is None and _flattened(reader, fx, source):
        return
    raise reader.unknown(fx, f"{opname(fx)} to {tuple(shape)}")


def _flattened(reader: Reader, fx: torch.fx.Node, source: torch.fx.Node) -> bool:
    """A view that cuts dimensions elsewhere (7 x 6 of 6 x 7): those as one, and that cut."""
    before, after = reader.shape(source), reader.shape(fx)
    first = next((d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    least = min(len(before), len(after)) - first
    last = next((d for d in range(least) if before[-1 - d] != after[-1 - d]), least)
    flat = [*before[:first], math.prod(before[first : len(before) - last]), *before[len(before) - last :]]
    apart = Factors.of(flat)
    if not first or not apart.reshape(after):
        return False
    with reader.graph.inserting_before(fx):
        whole = reader.graph.call_function(torch.ops.aten.reshape.default, (source, flat))
    whole.meta = {**fx.meta, "val": torch.empty(flat, dtype=fx.meta["val"].dtype, device="meta")}
    joined = Factors.of(before)
    if not joined.reshape(flat):
        return False
    reader.node(whole, "rearrange", [source], joined.attributes())
    reader.factors[fx] = (whole, apart)
    return True


def reshaped(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _rearrange(reader, fx, None)


def _permuted(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _rearrange(reader, fx, order_of(fx, len(reader.shape(fx))))


def _pixel_shuffle(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    n, c, h, w = reader.shape(given["self"])
    r = given["upscale_factor"]
    _steps(reader, fx, [[n, c // r**2, r, r, h, w], (0, 1, 4, 2, 5, 3), [n, c // r**2, h * r, w * r]])


def _pixel_unshuffle(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    n, c, h, w = reader.shape(given["self"])
    r = given["downscale_factor"]
    _steps(reader, fx, [[n, c, h // r, r, w // r, r], (0, 1, 3, 5, 2, 4), [n, c * r**2, h // r, w // r]])


def _channel_shuffle(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    n, c, *rest = reader.shape(given["self"])
    g = given["groups"]
    every = tuple(range(3, 3 + len(rest)))
    _steps(reader, fx, [[n, g, c // g, *rest], (0, 2, 1, *every), [n, c, *rest]])


def _steps(reader: Reader, fx: torch.fx.Node, steps: Sequence[list[int] | tuple[int, ...]]) -> None:
    source = reader.through(fx.args[0])
    factors = Factors.of(reader.shape(source))
    for step in steps:
        if isinstance(step, tuple):
            factors.permute(step)
        elif not factors.reshape(step):
            raise reader.unknown(fx, opname(fx))
    reader.factors[fx] = (source, factors)


def _cat(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    _concatenate(reader, fx, list(given["tensors"]), given["dim"])


def _concatenate(reader: Reader, fx: torch.fx.Node, tensors: list[torch.fx.Node], dim: int) -> None:
    """Values side by side; zeros beside them are padding; parameters (a class token) one node each."""
    rank = len(reader.shape(fx))
    tensors = [own for own in tensors if 0 not in reader.shape(own)]  # without those of no entries
    if len(tensors) == 1:
        reader.same[fx] = tensors[0]
        return
    if reader.shape(tensors[0])[dim] % INPUT == 0:
        raise reader.unknown(fx, "images side by side")
    values = [i for i, t in enumerate(tensors) if reader.is_value(t) or _is_table(reader, t)]
    values = list(range(values[0], values[-1] + 1))  # what is between them (registers) is a value of its own
    if len(values) == len(tensors):
        reader.node(fx, "concatenate", tensors, {"dim": dim % rank})
        return
    first, last = values[0], values[-1]
    lone = [*reversed(tensors[:first]), *tensors[last + 1 :]]
    inner = reader.name(fx, {}) + "_values"
    if len(values) > 1:
        reader.node(fx, "concatenate", [tensors[i] for i in values], {"dim": dim % rank}, name=inner)
    else:
        reader.names[fx] = reader.value(tensors[first])
    for i, part in enumerate(lone):
        attributes, parameters = _beside(reader, part, i < first, dim % rank, rank)
        name = reader.name(fx, {}) if i == len(lone) - 1 else f"{reader.name(fx, {})}_{i}"
        operation = "concatenate_parameter" if parameters else "pad"
        before = reader.names[fx]
        reader.nodes.append(Node(name, operation, (before,), attributes, parameters))
        reader.taken.add(name)
        reader.names[fx] = name


def _is_table(reader: Reader, part: torch.fx.Node) -> bool:
    """Whether a constant is of numbers that are no parameters (coordinates), and not zero."""
    part = reader.through(part)
    return not reader.from_parameters(part) and bool(reader.folding.value(part, reader.module).any())


def _beside(
    reader: Reader, part: torch.fx.Node, ahead: bool, dim: int, rank: int
) -> tuple[dict[str, Any], dict[str, str]]:
    part = reader.through(part)
    if not reader.from_parameters(part):
        found = reader.folding.value(part, reader.module)
        if not bool(found.any()):
            pad = [0, 0] * (rank - dim)
            pad[-2 if ahead else -1] = reader.shape(part)[dim]
            return {"pad": pad}, {}
    return {"dim": dim - rank, "first": ahead}, {"value": reader.parameter(unexpanded(reader, part))}


def _stack(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    dim, tensors = given["dim"] % len(reader.shape(fx)), given["tensors"]
    if not all(reader.is_value(t) for t in tensors):
        raise reader.unknown(fx, "a stack of constants and values")
    names = []
    for i, tensor in enumerate(tensors):
        shape = reader.shape(tensor)
        factors = Factors.of(shape)
        factors.reshape([*shape[:dim], 1, *shape[dim:]])
        name = f"{reader.name(fx, {})}_{i}"
        reader.nodes.append(Node(name, "rearrange", (reader.value(tensor),), factors.attributes()))
        names.append(name)
    name = reader.name(fx, {})
    reader.nodes.append(Node(name, "concatenate", tuple(names), {"dim": dim}))
    reader.taken.update((name, *names))
    reader.names[fx] = name


def _windows(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any], name: str) -> None:
    """Windows taken apart, or added up again (``output_size``)."""
    settings = {key: list(value) for key, value in given.items() if key != "self"}
    reader.node(fx, name, [given["self"]], settings)


def _repeat_interleave(reader: Reader, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
    """Each entry of a dimension several times, one after the other: one more dimension, expanded, then joined."""
    shape, repeats, dim = reader.shape(given["self"]), given["repeats"], given["dim"]
    if not isinstance(repeats, int) or dim is None:
        raise reader.unknown(fx, "repeat_interleave by other than one number and one dimension")
    if repeats == 1:
        reader.same[fx] = given["self"]
        return
    name = reader.name(fx, {})
    repeated(reader, name, reader.value(given["self"]), shape, dim % len(shape), repeats)
    reader.names[fx] = name


def repeated(reader: Reader, name: str, value: str, shape: Sequence[int], dim: int, repeats: int) -> None:
    """A node that has each entry of a dimension of a value several times, one after the other."""
    behind = [*shape[: dim + 1], 1, *shape[dim + 1 :]]
    wide = [repeats if d == dim + 1 else n for d, n in enumerate(behind)]
    apart, joined = Factors.of(shape), Factors.of(wide)
    apart.reshape(behind)
    joined.reshape([n * repeats if d == dim else n for d, n in enumerate(shape)])
    sizes = [repeats if d == dim + 1 else -1 for d in range(len(wide))]
    reader.add(Node(f"{name}_apart", "rearrange", (value,), apart.attributes()))
    reader.add(Node(f"{name}_wide", "expand", (f"{name}_apart",), {"sizes": sizes}))
    reader.add(Node(name, "rearrange", (f"{name}_wide",), joined.attributes()))


MOVING = {
    "repeat_interleave": _repeat_interleave,
    "im2col": partial(_windows, name="unfold"),
    "col2im": partial(_windows, name="fold"),
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    **dict.fromkeys(RESHAPES, reshaped),
    **dict.fromkeys(PERMUTES, _permuted),
}
