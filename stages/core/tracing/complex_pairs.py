"""Complex numbers as the pairs of real ones that they are made of: rotary positions, Fourier transforms.

Of every complex value that depends on the input there are two, its real and its imaginary part, by the rules of
arithmetic; what torch does to both alike (views, slices, sums over places) is done twice.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor

from stages.core.tracing.export import opname
from stages.core.tracing.permuting import PERMUTES
from stages.core.tracing.reader import RESHAPES, SKIPPED, place_of
from stages.core.tracing.rewriting import called, given_to

Part = torch.fx.Node | float | None  # of a real number the imaginary part is nothing
Pair = tuple[Part, Part]
ALIKE = {
    *RESHAPES, *PERMUTES, *(SKIPPED - {"to", "_to_copy", "conj"}), "slice", "select", "narrow", "cat", "stack", "roll",
    "flip", "expand", "repeat", "split", "split_with_sizes", "chunk", "unbind", "getitem", "sum", "mean",
    "slice_scatter", "copy", "index", "index_select", "pad", "constant_pad_nd", "neg", "unfold", "concat",
}  # fmt: skip
FOURIER = {
    f"fft_{way}{dims}": f"{way}n" for way in ("fft", "ifft", "rfft", "irfft") for dims in ("", "2", "n")
}
WITH_BIAS = ("linear", "conv1d", "conv2d", "conv3d")
PRODUCTS_OF_TWO = ("mul", "multiply", "matmul", "mm", "bmm", "einsum", *WITH_BIAS)


@torch.library.custom_op("networks::fourier", mutates_args=())
def _fourier(
    real: Tensor,
    imaginary: Tensor | None,
    kind: str,
    sizes: list[int] | None,
    dims: list[int],
    norm: str,
    part: str,
) -> Tensor:
    """One part of a transform; only read, never run."""
    return real.clone()


def pairs_apart(graph: torch.fx.Graph, constants: Collection[str], kind: str) -> None:
    """Rewrite a graph of ATen calls in place.

    constants: placeholders that are no input. kind: the network's type. Raises InputError for what does something
    else with complex numbers that depend on the input.
    """
    writer = _Pairs(graph, kind)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in constants:
            writer.given.add(node)
        elif node.op == "call_function" and any(own in writer.given for own in node.all_input_nodes):
            writer.given.add(node)
            if any(own in writer.pairs for own in node.all_input_nodes) or _complex(node.meta.get("val")):
                writer.write(node)
    if writer.pairs:
        graph.eliminate_dead_code()


def _complex(value: Any) -> bool:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(first, Tensor) and first.is_complex()


class _Pairs:
    """given: calls that depend on the input. pairs: of complex ones their two parts."""

    def __init__(self, graph: torch.fx.Graph, kind: str) -> None:
        self.graph, self.kind = graph, kind
        self.given: set[torch.fx.Node] = set()
        self.pairs: dict[torch.fx.Node, Pair] = {}

    def write(self, node: torch.fx.Node) -> None:
        """Two calls, or some more, in the place of one."""
        name, self.at = opname(node), node
        with self.graph.inserting_before(node):
            call = CALLS_OF_PAIRS.get(name)
            if call is not None:
                found = call(self, node)
            elif name in FOURIER:
                found = _transform(self, node, FOURIER[name])
            elif name in ALIKE:
                found = self._alike(node)
            else:
                raise place_of(node, self.kind).refusal(f"no rule for {name} of complex numbers")
        if isinstance(found, tuple):
            self.pairs[node] = found
        else:
            node.replace_all_uses_with(found)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call on real numbers, with what is known of its value."""
        found = called(self.graph, self.at, target, *args, **kwargs)
        self.given.add(found)
        return found

    def pair(self, own: Any) -> Pair:
        """The parts of a value, a constant or a number."""
        if not isinstance(own, torch.fx.Node):
            return (own.real, own.imag) if isinstance(own, complex) else (own, None)
        if own in self.pairs or not _complex(own.meta["val"]):
            return self.pairs.get(own, (own, None))
        turned = self.call(torch.ops.aten.view_as_real.default, own)
        return tuple(self.call(torch.ops.aten.select.int, turned, -1, i) for i in (0, 1))

    def add(self, a: Part, b: Part, times: int = 1) -> Part:
        """a + b, or a - b."""
        if b is None:
            return a
        if a is None:
            return b if times == 1 else self.call(torch.ops.aten.neg.default, b)
        aten = torch.ops.aten
        kind = aten.add if times == 1 else aten.sub
        return self.call(kind.Tensor if isinstance(b, torch.fx.Node) else kind.Scalar, a, b)

    def _alike(self, node: torch.fx.Node) -> Pair:
        """One call for each part."""
        parts = {own: self.pair(own) for own in node.all_input_nodes if _complex(own.meta["val"])}
        real = {own: pair[0] for own, pair in parts.items()}
        other = {own: _zeros(self, pair[0]) if pair[1] is None else pair[1] for own, pair in parts.items()}
        return self._with(node, real), self._with(node, other)

    def _with(self, node: torch.fx.Node, parts: Mapping[torch.fx.Node, Part]) -> torch.fx.Node:
        """The call on these parts of what it reads."""
        args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda own: parts.get(own, own))
        return self.call(node.target, *args[0], **args[1])


def _zeros(writer: _Pairs, like: Part) -> torch.fx.Node:
    return writer.call(torch.ops.aten.mul.Scalar, like, 0.0)


def _product(writer: _Pairs, node: torch.fx.Node) -> Pair:
    """(a + ib)(c + id) of what is linear in two arguments."""
    name, rest = opname(node), list(node.args)
    at = (
        next((i for i, own in enumerate(rest) if isinstance(own, list | tuple)), None)
        if name == "einsum"
        else None
    )
    both = list(rest[at]) if at is not None else rest[:2]
    if len(both) != 2:
        raise place_of(node, writer.kind).refusal(
            f"no rule for {name} of complex numbers with more than two values"
        )
    (a, b), (c, d) = (writer.pair(own) for own in both)
    added = writer.pair(rest[2]) if name in WITH_BIAS and len(rest) > 2 else (None, None)

    def of(x: Part, y: Part, bias: Part = None) -> Part:
        if x is None or y is None:
            return None
        if at is not None:
            return writer.call(node.target, *rest[:at], [x, y], *rest[at + 1 :])
        if not isinstance(y, torch.fx.Node):
            return writer.call(torch.ops.aten.mul.Scalar, x, y)
        if name in WITH_BIAS:
            return writer.call(node.target, x, y, bias, *rest[3:])
        return writer.call(torch.ops.aten.mul.Tensor if name == "multiply" else node.target, x, y)

    return writer.add(of(a, c, added[0]), of(b, d), -1), writer.add(of(a, d, added[1]), of(b, c))


def _sum(writer: _Pairs, node: torch.fx.Node, times: int) -> Pair:
    (a, b), (c, d) = (writer.pair(own) for own in node.args[:2])
    return writer.add(a, c, times), writer.add(b, d, times)


def _quotient(writer: _Pairs, node: torch.fx.Node) -> Pair:
    """By real numbers, or with the conjugate of what it is divided by, by that one's square."""
    (a, b), (by, other), aten = writer.pair(node.args[0]), writer.pair(node.args[1]), torch.ops.aten
    if other is not None:
        if not isinstance(by, torch.fx.Node) or not isinstance(a, torch.fx.Node):
            raise place_of(node, writer.kind).refusal("no rule for a quotient of a number and complex ones")
        call = writer.call
        both = (None, None) if b is None else (call(aten.mul.Tensor, b, other), call(aten.mul.Tensor, b, by))
        a, b = (
            writer.add(call(aten.mul.Tensor, a, by), both[0]),
            writer.add(both[1], call(aten.mul.Tensor, a, other), -1),
        )
        by = call(aten.add.Tensor, *(call(aten.mul.Tensor, own, own) for own in (by, other)))
    kind = aten.div.Tensor if isinstance(by, torch.fx.Node) else aten.div.Scalar
    return writer.call(kind, a, by), None if b is None else writer.call(kind, b, by)


def _exponential(writer: _Pairs, node: torch.fx.Node) -> Pair:
    (a, b), aten = writer.pair(node.args[0]), torch.ops.aten
    size = writer.call(aten.exp.default, a)
    if b is None:
        return size, None
    return tuple(
        writer.call(aten.mul.Tensor, size, writer.call(turn.default, b)) for turn in (aten.cos, aten.sin)
    )


def _transform(writer: _Pairs, node: torch.fx.Node, kind: str) -> Pair | torch.fx.Node:
    """Each part of a transform as a call of its own, over all its dimensions at once."""
    given = {own.name: own.default_value for own in node.target._schema.arguments} | given_to(node)
    a, b = writer.pair(node.args[0])
    rank, sizes, dims = len(a.meta["val"].shape), given.get("s", given.get("n")), given.get("dim")
    sizes = [sizes] if isinstance(sizes, int) else sizes
    if dims is None:
        dims = range(rank)[-len(sizes) :] if sizes else range(rank)
    dims = [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    settings = (kind, sizes and list(sizes), dims, given.get("norm") or "backward")
    like, found = node.meta["val"], []
    for part in ("real", "imaginary")[: 2 if like.is_complex() else 1]:
        made = writer.graph.call_function(_fourier._opoverload, (a, b, *settings, part))
        made.meta = {**node.meta, "val": torch.empty(like.shape, dtype=a.meta["val"].dtype, device="meta")}
        writer.given.add(made)
        found.append(made)
    return tuple(found) if len(found) == 2 else found[0]


def _from_pairs(writer: _Pairs, node: torch.fx.Node) -> Pair:
    return tuple(writer.call(torch.ops.aten.select.int, node.args[0], -1, i) for i in (0, 1))


def _to_pairs(writer: _Pairs, node: torch.fx.Node) -> torch.fx.Node:
    a, b = writer.pair(node.args[0])
    return writer.call(torch.ops.aten.stack.default, [a, _zeros(writer, a) if b is None else b], -1)


def _conjugate(writer: _Pairs, node: torch.fx.Node) -> Pair:
    a, b = writer.pair(node.args[0])
    return a, None if b is None else writer.call(torch.ops.aten.neg.default, b)


def _of_parts(writer: _Pairs, node: torch.fx.Node, name: str) -> torch.fx.Node:
    """A real number of both parts: the length, the angle."""
    a, b = writer.pair(node.args[0])
    b = _zeros(writer, a) if b is None else b
    if name == "atan2":
        return writer.call(torch.ops.aten.atan2.default, b, a)
    return writer.call(torch.ops.aten.hypot.default, a, b)


def _part(writer: _Pairs, node: torch.fx.Node, i: int) -> Part:
    a, b = writer.pair(node.args[0])
    return a if i == 0 else _zeros(writer, a) if b is None else b


def _polar(writer: _Pairs, node: torch.fx.Node) -> Pair:
    aten, (size, angle) = torch.ops.aten, node.args[:2]
    return tuple(
        writer.call(aten.mul.Tensor, size, writer.call(turn.default, angle)) for turn in (aten.cos, aten.sin)
    )


def _converted(writer: _Pairs, node: torch.fx.Node) -> Pair | Part:
    """Real numbers that are made complex, or stay what they are."""
    pair = writer.pair(node.args[0])
    return pair if _complex(node.meta["val"]) else pair[0]


CALLS_OF_PAIRS: Mapping[str, Callable[[_Pairs, torch.fx.Node], Any]] = {
    "view_as_complex": _from_pairs,
    "view_as_real": _to_pairs,
    "complex": lambda writer, node: tuple(node.args[:2]),
    "polar": _polar,
    "real": partial(_part, i=0),
    "imag": partial(_part, i=1),
    "abs": partial(_of_parts, name="hypot"),
    "exp": _exponential,
    "angle": partial(_of_parts, name="atan2"),
    **dict.fromkeys(PRODUCTS_OF_TWO, _product),
    **dict.fromkeys(("add",), partial(_sum, times=1)),
    **dict.fromkeys(("sub", "subtract"), partial(_sum, times=-1)),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    **dict.fromkeys(("conj", "_conj", "conj_physical"), _conjugate),
    **dict.fromkeys(("to", "_to_copy"), _converted),
}
