"""torch.einsum as products of matrices, linear maps and elementwise products."""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.fx

from stages.core.graph.nodes import Node
from stages.core.tracing.bare import unexpanded, without
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.reader import Reader


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
    if any(len({*t}) < len(t) for t in (*letters, out)):
        raise refused
    while len(tensors) > 2:
        tensors[:2], letters[:2] = zip(_first_two(reader, fx, tensors, letters, out), strict=True)
        shapes = [reader.shape(t) for t in tensors]
    for i, tensor in enumerate(tensors):
        if not reader.is_value(tensor) and len(tensors) == 2:
            tensors[i], letters[i] = _bare(reader, tensor, letters[i], letters[1 - i], out)
    shapes = [reader.shape(t) for t in tensors]
    values = [
        reader.is_value(t) or any(n % INPUT == 0 for n in shape)
        for t, shape in zip(tensors, shapes, strict=True)
    ]
    sizes = {c: n for t, shape in zip(letters, shapes, strict=True) for c, n in zip(t, shape, strict=True)}
    if len(tensors) == 1:
        _of_one(reader, fx, tensors[0], letters[0], out, sizes)
        return
    lone = {c for t, other in (letters, letters[::-1]) for c in t if c not in other and c not in out}
    if lone or not any(values):
        raise refused
    product = _Product(reader, fx, tensors, letters, out, sizes)
    if all(values):
        product.of_values()
        return
    at = values.index(True)
    value, weight = letters[at], letters[1 - at]
    summed = [c for c in value if c in weight and c not in out]
    both = [c for c in value if c in weight and c in out]
    product = replace(product, tensors=[tensors[at], tensors[1 - at]], letters=[value, weight])
    if summed and both:
        product.looked_up()
    elif summed:
        product.linear()
    elif set(value) <= set(out) and sorted(out) == sorted({*value, *weight}):
        product.scaled()
    else:
        raise refused


def _bare(
    reader: Reader, tensor: torch.fx.Node, letters: str, other: str, out: str
) -> tuple[torch.fx.Node, str]:
    """A constant without the letters along which it is the same, where those are the other's and the result's too."""
    table = unexpanded(reader, tensor)
    same = [d for d, c in enumerate(letters) if reader.shape(table)[d] == 1 and c in other and c in out]
    if all(reader.shape(tensor)[d] % INPUT == 0 for d in same):  # learned queries, expanded to all images
        return tensor, letters
    left = "".join(c for d, c in enumerate(letters) if d not in same)
    kept = [d for d, n in enumerate(reader.shape(table)) if n != reader.shape(tensor)[d] and d not in same]
    return (tensor, letters) if kept else (without(reader, table, same), left)


def _first_two(
    reader: Reader, fx: torch.fx.Node, tensors: Sequence[torch.fx.Node], letters: Sequence[str], out: str
) -> tuple[torch.fx.Node, str]:
    """The product of the first two of several tensors, with the letters that the others or the result have."""
    left = {*out, *"".join(letters[2:])}
    kept = "".join(c for c in dict.fromkeys(letters[0] + letters[1]) if c in left)
    sizes = {
        c: n
        for t, own in zip(letters[:2], tensors[:2], strict=True)
        for c, n in zip(t, reader.shape(own), strict=True)
    }
    equation = f"{letters[0]},{letters[1]}->{kept}"
    with reader.graph.inserting_before(fx):
        found = reader.graph.call_function(torch.ops.aten.einsum.default, (equation, [*tensors[:2]]))
    like = fx.meta["val"]
    found.meta = {**fx.meta, "val": torch.empty([sizes[c] for c in kept], dtype=like.dtype, device="meta")}
    if all(own in reader.known for own in tensors[:2]):
        reader.known.add(found)
    else:
        read_einsum(reader, found, {"equation": equation, "tensors": list(tensors[:2])})
    return found, kept


def _of_one(
    reader: Reader, fx: torch.fx.Node, tensor: torch.fx.Node, letters: str, out: str, sizes: Mapping[str, int]
) -> None:
    """Sums over the letters that are not in the result, the others put in its order."""
    own, value, left = reader.name(fx, {}), reader.value(tensor), "".join(c for c in letters if c in out)
    dims = [d for d, c in enumerate(letters) if c not in out]
    if any(sizes[letters[d]] % INPUT == 0 for d in dims):
        raise reader.unknown(fx, "a sum over the images")
    if dims:
        name = own if left == out else f"{own}_sum"
        reader.add(Node(name, "sum", (value,), {"dims": dims, "keepdim": False}))
        value = name
    reader.names[fx] = reader.arranged(own, value, left, [*out], sizes)


@dataclass(frozen=True)
class _Product:
    """Two tensors by their letters, and the letters of what they give. Where one is a parameter, it is the second."""

    reader: Reader
    fx: torch.fx.Node
    tensors: Sequence[torch.fx.Node]
    letters: Sequence[str]
    out: str
    sizes: Mapping[str, int]

    def of_values(self) -> None:
        """As one product of matrices; letters of one side become one dimension."""
        a, b = self.letters
        both = [c for c in a if c in b and c in self.out]
        summed = "".join(c for c in a if c in b and c not in self.out)
        rows, columns = "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)
        own, names = self.reader.name(self.fx, {}), []
        for i, groups in enumerate(([*both, rows, summed], [*both, summed, columns])):
            value = self.reader.value(self.tensors[i])
            names.append(self.reader.arranged(f"{own}_{i}", value, self.letters[i], groups, self.sizes))
        self._add(own, f"{own}_product", "matmul", names, {}, [*both, rows, columns])

    def linear(self) -> None:
        """The parameter as the weight of a linear map over the letters that both have."""
        value, weight = self.letters
        summed, new = "".join(c for c in value if c in weight), "".join(c for c in weight if c not in value)
        kept, own = [c for c in value if c not in weight], self.reader.name(self.fx, {})
        shape = [math.prod(self.sizes[c] for c in letters) for letters in (new, summed)]
        state = self._state([weight.index(c) for c in new + summed], shape)
        given = self.reader.value(self.tensors[0])
        read = self.reader.arranged(f"{own}_input", given, value, [*kept, summed], self.sizes)
        self._add(own, f"{own}_map", "linear", [read], {"weight": state}, [*kept, new])

    def looked_up(self) -> None:
        """The parameter as one matrix for each entry of the letters that all three have."""
        value, weight = self.letters
        both = [c for c in value if c in weight and c in self.out]
        summed = "".join(c for c in value if c in weight and c not in self.out)
        new = [c for c in weight if c not in value]
        kept, rows = [c for c in value if c not in weight], ""
        behind = len(kept) > 1 and value.index(kept[-1]) > min(value.index(c) for c in both)
        if len(kept) > 2 or behind:  # else what is left may be heads, which are no rows
            *kept, rows = kept
        order = [weight.index(c) for c in (*both, *summed, *new)]
        shape = [self.sizes[c] for c in both]
        shape += [math.prod(self.sizes[c] for c in letters) for letters in (summed, new)]
        state, own = self._state(order, shape), self.reader.name(self.fx, {})
        given = self.reader.value(self.tensors[0])
        read = self.reader.arranged(f"{own}_input", given, value, [*kept, *both, rows, summed], self.sizes)
        made = [*kept, *both, rows, "".join(new)]  # one row where there are none
        self._add(own, f"{own}_product", "matmul_parameter", [read], {"value": state}, made)

    def scaled(self) -> None:
        """The parameter multiplies entry by entry; letters that the value has not are dimensions of one entry there."""
        value, weight = self.letters
        new = [c for c in weight if c not in value]
        held = [c for c in value if c in weight]
        first = value.index(held[0]) if held else len(value)
        shape = [self.sizes[c] if c in weight else 1 for c in (*value[first:], *new)]
        state, own = (
            self._state([weight.index(c) for c in (*held, *new)], shape),
            self.reader.name(self.fx, {}),
        )
        given = self.reader.value(self.tensors[0])
        if new:
            given = self.reader.arranged(
                f"{own}_wide", given, value, [*value, *([""] * len(new))], self.sizes
            )
        self._add(own, f"{own}_product", "multiply_parameter", [given], {"value": state}, [*value, *new])

    def _state(self, order: Sequence[int], shape: Sequence[int]) -> str:
        """The state name of the parameter, its dimensions in another order and shape."""
        return self.reader.folding.want(self.reader.through(self.tensors[1]), order=order, shape=shape)

    def _add(
        self,
        own: str,
        otherwise: str,
        operation: str,
        inputs: Sequence[str],
        parameters: Mapping[str, str],
        made: Sequence[str],
    ) -> None:
        """The node that gives dimensions ``made``, by the name ``own`` if that is what is asked for; then what does."""
        name = own if [*made] == [*self.out] else otherwise
        self.reader.add(Node(name, operation, tuple(inputs), {}, parameters))
        self.reader.names[self.fx] = self.reader.spread(own, name, made, self.out, self.sizes)
