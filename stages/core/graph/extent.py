"""How many numbers a value of one image holds, before it is made: what is large is laid out without its numbers."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from stages.core.graph.nodes import Node, oriented
from stages.core.runtime.errors import InputError

LARGE = (
    2**24
)  # entries of a value; beyond it only shapes are computed, as that takes half a second to begin with
MOST_VALUE = 2**28  # entries of one image's value: a gigabyte in single precision


def place_for(entries: float) -> str:
    """The device on which a value of so many entries is laid out: ``meta`` holds none of them."""
    return "meta" if entries > LARGE else "cpu"


def most_entries(node: Node, inputs: Sequence[Tensor], own: Mapping[str, Tensor]) -> float:
    """No fewer entries than a node's value will have, nor than what is made on the way to it."""
    a, first, last = node.attributes, inputs[0].shape, inputs[-1].shape
    entries = float(sum(value.numel() for value in inputs))
    if node.operation == "embedding":
        entries = max(entries, first.numel() * own["weight"].shape[1])
    elif node.fitted:
        rows, columns = oriented(node, own["weight"]).shape[:2]
        grouped = a.get("groups", 1) if node.transposed else 1 / a.get("groups", 1)
        entries = max(entries, first.numel() * rows * grouped / max(columns, 1))
    elif node.operation in ("matmul", "attention"):  # of attention: its scores
        of = last[-1] if node.operation == "matmul" else inputs[1].shape[-2]
        entries = max(entries, _broadcast([first[:-1], [*last[:-2], 1]]) * of)
    elif a.get("turned"):  # a table, seen as a linear map's weight
        entries = max(entries, first.numel() * own["value"].shape[-2])
    elif node.operation.endswith("_parameter") or len(inputs) > 1:
        entries = max(entries, _broadcast([first, last, *_seen(node, own)]))
    window = math.prod(_numbers(a.get("kernel_size")))
    if node.operation == "unfold":
        entries *= window
    elif node.operation == "fold":
        entries = max(entries, math.prod(_numbers(a["output_size"])) * first[1] / max(window, 1))
    for key in ("sizes", "size", "output_size"):
        sizes = _numbers(a.get(key))
        entries = max(entries, math.prod(sizes) * math.prod(first[: max(len(first) - len(sizes), 0)]))
    entries *= math.prod(max(own, 1) for own in _numbers(a.get("sizes_over")))
    spatial = max(len(first) - 2, 1)
    if node.transposed:
        entries *= max(_numbers(a.get("stride")), default=1) ** spatial * own["weight"].shape[2:].numel()
    entries *= max(1.0, *_numbers(a.get("scale_factor")), 1.0) ** spatial
    pad = max((*_numbers(a.get("pad")), *_numbers(a.get("padding"))), default=0)
    padded = first[1:] if "pad" in a else first[2:]
    return entries * math.prod(1 + 2 * pad / max(extent, 1) for extent in padded)


def _seen(node: Node, own: Mapping[str, Tensor]) -> list[Sequence[int]]:
    """The shapes as which the parameters of an elementwise operation are read."""
    return [node.attributes.get("view", value.shape) for value in own.values()]


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    """At most how many entries shapes have that are broadcast to each other."""
    rank = max(len(shape) for shape in shapes)
    padded = [[1] * (rank - len(shape)) + [abs(n) for n in shape] for shape in shapes]
    return math.prod(max(sizes) for sizes in zip(*padded, strict=True))


def _numbers(value: object) -> list[float]:
    """The numbers of a setting, without their signs."""
    if isinstance(value, list | tuple):
        return [number for own in value for number in _numbers(own)]
    return [abs(float(value))] if isinstance(value, int | float) else []


def check_value(name: str, value: Tensor) -> None:
    """Gate on the size of a value. Raises InputError."""
    if value.numel() > MOST_VALUE:
        raise InputError(f"{name}: gives {value.numel()} numbers for one image; allowed: up to {MOST_VALUE}")
