"""Constants without the dimensions along which they are all the same: what was expanded, or has one entry there."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from stages.core.tracing.export import opname
from stages.core.tracing.permuting import PERMUTES, order_of
from stages.core.tracing.reader import RESHAPES, SKIPPED, Reader
from stages.core.tracing.rewriting import called


def unexpanded(reader: Reader, fx: torch.fx.Node) -> torch.fx.Node:
    """A constant of as many dimensions, with one entry where it was expanded."""
    fx = reader.through(fx)
    if fx.op != "call_function" or not fx.args or fx.args[0] not in reader.known:
        return fx
    name, source = opname(fx), fx.args[0]
    if name in SKIPPED:
        return unexpanded(reader, source)
    if name == "expand":
        inner = unexpanded(reader, source)
        shape, ahead = reader.shape(inner), len(reader.shape(fx)) - len(reader.shape(inner))
        return (
            made_constant(reader, torch.ops.aten.reshape.default, inner, [1] * ahead + shape)
            if ahead
            else inner
        )
    if name in RESHAPES:
        inner, (first, *rest) = unexpanded(reader, source), reader.shape(fx)
        before = reader.shape(source)
        if reader.shape(inner) == [1, *before[1:]] and before[0] == first != 1:
            return made_constant(reader, torch.ops.aten.reshape.default, inner, [1, *rest])
    if name in PERMUTES:
        inner = unexpanded(reader, source)
        if inner is not reader.through(source):
            return made_constant(
                reader, torch.ops.aten.permute.default, inner, order_of(fx, len(reader.shape(fx)))
            )
    return fx


def without(reader: Reader, fx: torch.fx.Node, dims: Sequence[int]) -> torch.fx.Node:
    """A constant without dimensions that have one entry."""
    for dim in sorted(dims, reverse=True):
        fx = made_constant(reader, torch.ops.aten.select.int, fx, dim, 0)
    return fx


def made_constant(reader: Reader, target: Any, fx: torch.fx.Node, *args: Any) -> torch.fx.Node:
    """What a call makes of a constant, as one more constant."""
    with reader.graph.inserting_before(reader.at):
        found = called(reader.graph, fx, target, fx, *args)
    reader.known.add(found)
    return found
