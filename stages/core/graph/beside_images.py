"""What a forward puts on the dimension of the images, (images * heads, ...), on dimensions of its own again.

A view (images * heads, ...) of a value is one (images, heads, ...) just as well: what stands beside the images there is
kept apart through all that works on the other dimensions, until a view brings the images back to a dimension of their
own. Where something else reads such a value (a convolution) it is as it was.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.graph.nodes import REDUCTIONS, Graph, Node
from stages.core.graph.operations import BINARY, UNARY
from stages.core.graph.part_moves import rearranged

ANYWHERE = (  # what works on the last dimensions, or on every entry
    "linear", "layer_norm", "matmul", "attention", "pad", "matmul_parameter", "where", "shift", "scale", "divide_by",
    "subtract_from", "power", "power_of", "fill_parameter", *UNARY, *BINARY, *(f"{name}_parameter" for name in BINARY),
)  # fmt: skip
BY_DIMENSION = (
    "slice", "pick", "select", "concatenate", "softmax", "log_softmax", "normalize", "roll", "flip", "expand",
    "fourier", "cumsum", "sort", *REDUCTIONS,
)  # fmt: skip


def images_alone(graph: Graph, shapes: Mapping[str, Sequence[int]]) -> Graph:
    """The same network; the graph itself where nothing lies beside images. shapes: of each value, of one image."""
    writer = _Apart(shapes)
    for node in graph.nodes:
        writer.write(node)
    return Graph(tuple(writer.nodes)) if writer.lead and graph.output.name not in writer.lead else graph


class _Apart:
    """lead: extents of the dimensions that were made of what lies beside the images of a value."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.nodes: list[Node] = []
        self.lead: dict[str, list[int]] = {}
        self.shapes = shapes

    def write(self, node: Node) -> None:
        leads = [self.lead.get(name, []) for name in node.inputs]
        found = None
        if node.operation == "rearrange":
            found = self._rearranged(node, leads[0])
        elif any(leads) and all(own == leads[0] for own in leads):
            found = self._moved(node, leads[0])
        self.nodes.append(self._as_it_was(node) if found is None else found)

    def _rearranged(self, node: Node, lead: Sequence[int]) -> Node | None:
        """A change of places; what is beside the images, before it or behind it, lies on dimensions."""
        a = node.attributes
        first, free = a["atoms"][0], a["free"]
        pieces = _refined([first[0], *first[1:]], lead or [math.prod(first)])
        if free[0] != 0 or any(own is not None for own in free[1:]) or a["order"][0] != 0 or pieces is None:
            return None
        of_atoms, of_lead = pieces
        count = sum(map(len, of_atoms))
        atoms = [[1], *of_lead, *a["atoms"][1:]] if lead else [[1, *of_lead[0]], *a["atoms"][1:]]
        sizes, numbers, at = [n for own in atoms for n in own], [], 1
        for own in of_atoms:
            numbers.append(list(range(at, at + len(own))))
            at += len(own)
        numbers[0] = [0, *numbers[0]]
        numbers += [[i - len(first) + 1 + count] for i in range(len(first), len(a["order"]))]
        groups, start = [], 0
        for number in a["groups"]:
            groups.append([n for i in a["order"][start : start + number] for n in numbers[i]])
            start += number
        apart = [n for n in groups[0][1:] if sizes[n] > 1]
        if not lead and not apart:
            return node
        groups = [[n for n in groups[0] if n not in apart], *([n] for n in apart), *groups[1:]]
        if apart:
            self.lead[node.name] = [sizes[n] for n in apart]
        return rearranged(node.name, node.inputs[0], atoms, groups)

    def _moved(self, node: Node, lead: list[int]) -> Node | None:
        """An operation on the other dimensions; None where it works on that of the images."""
        a, more = dict(node.attributes), len(lead)
        if node.operation in BY_DIMENSION:
            rank = len(self.shapes[node.inputs[0]])
            dims = [own % rank for own in _listed(a.get("dims", a.get("dim", 1)))]
            if 0 in dims or ("sizes" in a and a["sizes"][0] != -1):
                return None
            if "dim" in a and a["dim"] > 0:
                a["dim"] += more
            if "dims" in a:
                a["dims"] = [own + more for own in dims]
            if "sizes" in a:
                a["sizes"] = [-1] * (more + 1) + list(a["sizes"][1:])
        elif node.operation not in ANYWHERE:
            return None
        self.lead[node.name] = lead
        return dataclasses.replace(node, attributes=a)

    def _as_it_was(self, node: Node) -> Node:
        """The node, whose inputs have what lies beside images there again."""
        names = list(node.inputs)
        for i, name in enumerate(names):
            lead = self.lead.get(name)
            if lead:
                sizes, count = [1, *lead, *self.shapes[name][1:]], len(lead) + 1
                joined = [list(range(count)), *([d] for d in range(count, len(sizes)))]
                names[i] = f"{node.name}_beside{i}"
                self.nodes.append(rearranged(names[i], name, [[n] for n in sizes], joined))
        return dataclasses.replace(node, inputs=tuple(names))


def _refined(a: Sequence[int], b: Sequence[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """The factors of both of two factorisations of one number, for each; None where there are none."""
    found: tuple[list[list[int]], list[list[int]]] = ([[] for _ in a], [[] for _ in b])
    left, at = [list(a), list(b)], [0, 0]
    while True:
        for side in (0, 1):
            while at[side] < len(left[side]) and left[side][at[side]] == 1:
                at[side] += 1
        ends = [at[side] == len(left[side]) for side in (0, 1)]
        if any(ends):
            return found if all(ends) else None
        both = [left[side][at[side]] for side in (0, 1)]
        size = min(both)
        if max(both) % size:
            return None
        for side in (0, 1):
            found[side][at[side]].append(size)
            left[side][at[side]] //= size


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
