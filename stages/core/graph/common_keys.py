"""One head of keys and values for many of queries (multi-query attention, Shazeer 2019): repeated for each of them.

Keys that all heads have in common may lie on no dimension of heads, or be broadcast over it. They are given one of one
head, of which a merged network has several, and each is then repeated as often as it has queries: as attention with
fewer heads of keys than of queries is written.
"""

import dataclasses
from collections.abc import Sequence

from stages.core.graph.axes import Value
from stages.core.graph.nodes import Node
from stages.core.graph.part_moves import rearranged, to_heads


def with_keys_repeated(node: Node, inputs: Sequence[Value]) -> list[Node]:
    """The node, or what it is where its one head of keys or values is repeated for each head of its first input."""
    rows = _heads_of_rows(node, inputs)
    if rows:
        return _with_rows_apart(node, inputs, rows)
    first, others = inputs[0], inputs[1:3] if node.operation == "attention" else inputs[1:2]
    rank, heads = len(first.shape), len(first.shape) - 3
    if heads < 1 or heads not in first.dims or first.labels.shape[heads] == 1:
        return [node]
    nodes, names = [], list(node.inputs)
    for i, value in enumerate(others, 1):
        name, own = f"{node.name}_each{i}", [d for d in value.dims if d > heads]
        if names[i] == name or len(value.shape) != rank or len(own) != 1 or value.labels.shape[heads] > 1:
            continue
        nodes += _repeated(name, names[i], value, own[0], first.shape[heads])
        names[i] = name
    return [*nodes, dataclasses.replace(node, inputs=tuple(names))]


def _heads_of_rows(node: Node, inputs: Sequence[Value]) -> int:
    """How many heads a product's rows are of, where they are heads and places on one dimension, heads first; or 0."""
    a, b = inputs[:2]
    row = len(a.shape) - 2
    if node.operation != "matmul" or len(b.shape) != row + 2 or row not in a.dims or row - 1 in a.dims:
        return 0
    labels, count = a.labels.movedim(row, 0).flatten(1), a.shape[row]
    heads = len(labels.unique(dim=0))
    if len(labels) == 1 or heads == count or count % heads or len(b.dims) != 1 or b.dims[0] < row:
        return 0
    own = labels.unflatten(0, (heads, -1))
    return heads if bool((own == own[:, :1]).all()) else 0


def _with_rows_apart(node: Node, inputs: Sequence[Value], heads: int) -> list[Node]:
    """(..., heads * places, k) times (..., k, n) with a dimension of heads."""
    a, b, name = *(list(value.shape) for value in inputs), node.name
    row, places = len(a) - 2, a[-2] // heads
    cut, whole = [[n] for n in a], [[n] for n in (*a[:-2], heads, places, b[-1])]
    cut[row] = [heads, places]
    lead = [[d] for d in range(row)]
    return [
        rearranged(f"{name}_rows", node.inputs[0], cut, [*lead, [row], [row + 1], [row + 2]]),
        rearranged(f"{name}_keys", node.inputs[1], [[n] for n in b], [*lead, [], [row], [row + 1]]),
        dataclasses.replace(node, name=f"{name}_apart", inputs=(f"{name}_rows", f"{name}_keys")),
        rearranged(name, f"{name}_apart", whole, [*lead, [row, row + 1], [row + 2]]),
    ]


def _repeated(name: str, source: str, value: Value, dim: int, times: int) -> list[Node]:
    """A value with units on ``dim``, in one head, as one whose heads are there ``times`` times, one after the other."""
    rank, heads, nodes = len(value.shape), len(value.shape) - 3, []
    one = [1 if d == heads else n for d, n in enumerate(value.shape)]
    if value.shape[heads] > 1:
        cut = {"dim": heads, "start": 0, "stop": 1, "step": 1}
        nodes.append(Node(f"{name}_one", "slice", (source,), cut))
        source = f"{name}_one"
    if heads not in value.dims:
        nodes.append(to_heads(f"{name}_head", source, one, dim, True))
        source = f"{name}_head"
    apart, wide = f"{name}_apart", f"{name}_wide"
    places = range(heads + 1, rank)
    behind = [[d] for d in range(heads + 1)] + [[]] + [[d] for d in places]
    joined = [[d] for d in range(heads)] + [[heads, heads + 1]] + [[d + 1] for d in places]
    sizes = [times if d == heads + 1 else -1 for d in range(rank + 1)]
    atoms = [[n] for n in (*one[: heads + 1], times, *one[heads + 1 :])]
    return [
        *nodes,
        rearranged(apart, source, [[n] for n in one], behind),
        Node(wide, "expand", (apart,), {"sizes": sizes}),
        rearranged(name, wide, atoms, joined),
    ]
