"""torch.einsum as products of matrices, linear maps and elementwise products."""

import math
import string
from collections.abc import Sequence
from typing import Any

import torch.fx

from stages.core.graph.nodes import Node
from stages.core.tracing.reader import Reader
from stages.core.tracing.rearranging import Factors


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each tensor and of the result, with letters for '...' and a result that is not written.

    ranks: of the tensors.
    """
    terms, arrow, out = equation.replace(" ", "").partition("->")
    spare = [c for c in string.ascii_letters if c not in equation]
    given = terms.split(",")
    widest = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(given, ranks, strict=True) if "..." in t),
        default=0,
    )
    dots = "".join(spare[:widest])
    letters = [
        t.replace("...", dots[widest - (rank - len(t.replace("...", ""))) :] if "..." in t else "")
        for t, rank in zip(given, ranks, strict=True)
    ]
    if arrow:
        return letters, out.replace("...", dots)
    named = "".join(t.replace("...", "") for t in given)
    return letters, dots + "".join(sorted(c for c in set(named) if named.count(c) == 1))


def read_einsum(reader: Reader, fx: torch.fx.Node, given: dict[str, Any]) -> None:
    """Of two tensors, one of which may be a parameter."""
    tensors = list(given["tensors"])
    shapes = [reader.shape(t) for t in tensors]
    refused = reader.unknown(fx, f"einsum {given['equation']}")
    letters, out = spelled_out(given["equation"], [len(shape) for shape in shapes])
    if len(tensors) != 2 or any(len({*t}) < len(t) for t in (*letters, out)):
        raise refused
    values = [reader.is_value(t) for t in tensors]
    sizes = {c: n for t, shape in zip(letters, shapes, strict=True) for c, n in zip(t, shape, strict=True)}
    lone = {c for t, other in (letters, letters[::-1]) for c in t if c not in other and c not in out}
    if lone or not any(values):
        raise refused
    if all(values):
        _product(reader, fx, tensors, letters, out, sizes)
        return
    at = values.index(True)
    value, weight = letters[at], letters[1 - at]
    summed = [c for c in value if c in weight and c not in out]
    both = [c for c in value if c in weight and c in out]
    if summed and both:
        raise refused
    if summed:
        _linear(reader, fx, (tensors[at], tensors[1 - at]), (value, weight), out, sizes)
    elif set(weight) <= set(value) and sorted(out) == sorted(value):
        _scaled(reader, fx, (tensors[at], tensors[1 - at]), (value, weight), out, sizes)
    else:
        raise refused


def _product(
    reader: Reader,
    fx: torch.fx.Node,
    tensors: Sequence[torch.fx.Node],
    letters: Sequence[str],
    out: str,
    sizes: dict[str, int],
) -> None:
    """Of two values as one product of matrices; letters of one side become one dimension."""
    a, b = letters
    both = [c for c in a if c in b and c in out]
    summed = "".join(c for c in a if c in b and c not in out)
    rows, columns = "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)
    own, names = reader.name(fx, {}), []
    for i, groups in enumerate(([*both, rows, summed], [*both, summed, columns])):
        value = reader.value(tensors[i])
        names.append(_arranged(reader, f"{own}_{i}", value, letters[i], groups, sizes))
    made = [*both, rows, columns]
    name = own if made == list(out) else f"{own}_product"
    reader.add(Node(name, "matmul", tuple(names)))
    reader.names[fx] = _spread(reader, own, name, made, out, sizes)


def _linear(
    reader: Reader,
    fx: torch.fx.Node,
    tensors: Sequence[torch.fx.Node],
    letters: Sequence[str],
    out: str,
    sizes: dict[str, int],
) -> None:
    """A parameter as the weight of a linear map over the letters that both have."""
    value, weight = letters
    summed, new = "".join(c for c in value if c in weight), "".join(c for c in weight if c not in value)
    kept, own = [c for c in value if c not in weight], reader.name(fx, {})
    order = [weight.index(c) for c in new + summed]
    shape = [math.prod(sizes[c] for c in new), math.prod(sizes[c] for c in summed)]
    state = reader.folding.want(reader.through(tensors[1]), order=order, shape=shape)
    read = _arranged(reader, f"{own}_input", reader.value(tensors[0]), value, [*kept, summed], sizes)
    made = [*kept, new]
    name = own if made == list(out) else f"{own}_map"
    reader.add(Node(name, "linear", (read,), {}, {"weight": state}))
    reader.names[fx] = _spread(reader, own, name, made, out, sizes)


def _scaled(
    reader: Reader,
    fx: torch.fx.Node,
    tensors: Sequence[torch.fx.Node],
    letters: Sequence[str],
    out: str,
    sizes: dict[str, int],
) -> None:
    """A parameter that multiplies entry by entry."""
    value, weight = letters
    held = [c for c in value if c in weight]
    first = value.index(held[0]) if held else len(value)
    shape = [sizes[c] if c in weight else 1 for c in value[first:]]
    state = reader.folding.want(
        reader.through(tensors[1]), order=[weight.index(c) for c in held], shape=shape
    )
    own = reader.name(fx, {})
    name = own if value == out else f"{own}_product"
    reader.add(Node(name, "multiply_parameter", (reader.value(tensors[0]),), {}, {"value": state}))
    reader.names[fx] = _spread(reader, own, name, list(value), out, sizes)


def _arranged(
    reader: Reader, name: str, value: str, found: str, groups: Sequence[str], sizes: dict[str, int]
) -> str:
    """A value whose dimensions are named ``found`` with those of each group as one dimension."""
    if [*found] == list(groups):
        return value
    factors = Factors.of([sizes[c] for c in found])
    factors.permute([found.index(c) for c in "".join(groups)])
    assert factors.reshape([math.prod(sizes[c] for c in group) for group in groups])
    reader.add(Node(name, "rearrange", (value,), factors.attributes()))
    return name


def _spread(
    reader: Reader, name: str, value: str, groups: Sequence[str], out: str, sizes: dict[str, int]
) -> str:
    """The inverse: groups of dimensions apart, in the order of ``out``."""
    if list(groups) == [*out]:
        return value
    line = "".join(groups)
    factors = Factors.of([math.prod(sizes[c] for c in group) for group in groups])
    assert factors.reshape([sizes[c] for c in line])
    factors.permute([line.index(c) for c in out])
    reader.add(Node(name, "rearrange", (value,), factors.attributes()))
    return name
