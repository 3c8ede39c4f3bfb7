"""Nodes that give units which are one part (a head) a dimension of its own, on which a merged network has several."""

import dataclasses
from collections.abc import Sequence

from stages.core.graph.nodes import Node


def to_heads(
    name: str, source: str, shape: Sequence[int], dim: int, spare: bool, at: int | None = None
) -> Node:
    """Units of dimension ``dim`` to heads, at ``at`` or before the last two dimensions; spare: on what lies there."""
    rank, heads = len(shape), len(shape) - 3 if spare else len(shape) - 2
    heads = heads if at is None else at
    atoms = [[1, n] if d == dim else [n] for d, n in enumerate(shape)]
    number = [d + (d > dim) for d in range(rank)]
    groups = [[dim + 1] if d == dim else [number[d]] for d in range(rank)]
    if spare:
        groups[heads].append(dim)
    else:
        groups.insert(heads, [dim])
    return rearranged(name, source, atoms, groups)


def from_heads(
    name: str, source: str, shape: Sequence[int], dim: int, spare: bool, at: int | None = None
) -> Node:
    """The inverse, to ``shape``, units on dimension ``dim``."""
    rank, heads = len(shape), len(shape) - 3 if spare else len(shape) - 2
    heads = heads if at is None else at
    whole = list(shape) if spare else [*shape[:heads], 1, *shape[heads:]]
    groups = [[d] for d in range(len(whole))]
    own = dim if spare else dim + 1
    groups[own] = [heads, own]
    if spare:
        groups[heads] = []
    else:
        groups.pop(heads)
    assert len(groups) == rank
    return rearranged(name, source, [[n] for n in whole], groups)


def rearranged(name: str, source: str, atoms: list[list[int]], groups: list[list[int]]) -> Node:
    # Images may come behind heads; windows beside them come first, ahead of other single entries.
    images = {next((d for d, own in enumerate(atoms) if own == [1]), 0)} if atoms[0][0] > 1 else {0}
    images |= {0} if len(atoms[0]) == 1 else set()
    attributes = {
        "atoms": atoms,
        "free": [0 if d in images else None for d in range(len(atoms))],
        "order": [i for own in groups for i in own],
        "groups": [len(own) for own in groups],
    }
    return Node(name, "rearrange", (source,), attributes)


def one_part_more(node: Node, shapes: Sequence[Sequence[int]], ranks: Sequence[int | None]) -> list[Node]:
    """A node that joins two values, one of which was given a dimension for its one head: the other gets one too.

    shapes: of both. ranks: those that they have in the graph as it was read.
    """
    short, long = sorted((0, 1), key=lambda i: len(shapes[i]))
    if None in ranks or ranks[0] != ranks[1] or len(shapes[long]) != len(shapes[short]) + 1 < 4:
        return [node]
    at, name, names = len(shapes[long]) - 3, f"{node.name}_beside", list(node.inputs)
    groups = [[d] for d in range(len(shapes[short]))]
    made = rearranged(name, names[short], [[n] for n in shapes[short]], [*groups[:at], [], *groups[at:]])
    names[short] = name
    return [made, dataclasses.replace(node, inputs=tuple(names))]
