"""Units that are one part: attention with one head, a mean over all channels. The part gets a dimension of its own.

So a merged network can have several.

With several heads the network itself has a dimension for them, on which merged heads lie side by side. With one, all
units lie on the dimension that the scores sum over: nodes before and behind move them to a dimension of heads,
(..., positions, units) -> (..., heads, positions, units of a head), and back.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from stages.core.graph import rules
from stages.core.graph.axes import Value
from stages.core.graph.common_keys import with_keys_repeated
from stages.core.graph.inside import inside_heads, mapped_inside
from stages.core.graph.nodes import REDUCTIONS, Graph, Node
from stages.core.graph.operations import BINARY, OPERATIONS
from stages.core.graph.part_moves import from_heads, rearranged, to_heads


def with_heads(
    node: Node,
    inputs: Sequence[Value],
    masked: Sequence[int],
    logits: bool,
    last: bool,
    mapped: int,
    scored: bool,
) -> list[Node]:
    """The node, or what it is with a dimension for its one head.

    masked: the shape of a mask, () without one. logits: whether it gives the network's logits, or follows them. last:
    whether no other product reads what this one gives. mapped: how many entries its weight gives. scored: whether a
    product sums over places by what it gives.
    """
    if scored and _one_of_pairs(node, inputs[0]):
        cut = node.attributes.get("atoms", [[n] for n in inputs[0].shape])
        return [rearranged(node.name, node.inputs[0], cut, [[0], [3], [1], [2]])]
    looks = node.operation in (*REDUCTIONS, "local_response_norm") and "spread" not in node.attributes
    if looks or (node.operation == "softmax" and not logits):
        return _whole(node, inputs[0])
    if node.operation == "linear" and inside_heads(inputs[0]):
        return mapped_inside(node, inputs[0], mapped)
    if node.operation in ("attention", "matmul"):
        repeated = with_keys_repeated(node, inputs)
        if len(repeated) > 1:
            return repeated
    if node.operation == "attention" and all(_on_last(value) for value in inputs[:3]):
        return _attention(node, inputs, masked)
    if node.operation == "matmul_parameter" and _on_last(inputs[0]) and inputs[0].shape[1:2] == (1,):
        name = f"{node.name}_head"
        apart = to_heads(name, node.inputs[0], inputs[0].shape, len(inputs[0].shape) - 1, True, 1)
        return [apart, dataclasses.replace(node, inputs=(name,))]
    if node.operation in ("rearrange", "expand"):
        return [_lifted(node, inputs[0])]
    if len(inputs) == 2 and node.operation in BINARY and _face_to_face(*inputs):
        return _product(node, {i: own.dims[0] for i, own in enumerate(inputs)}, inputs, False, back=False)
    if len(inputs) == 2 and node.operation in BINARY and _of_places(*inputs):
        names = [f"{node.name}_head{i}" for i in range(2)]
        apart = [
            to_heads(name, source, value.shape, value.dims[0], True, _of_places(*inputs))
            for name, source, value in zip(names, node.inputs, inputs, strict=True)
        ]
        return [*apart, dataclasses.replace(node, inputs=tuple(names))]
    if node.operation != "matmul" or all(value.common for value in inputs):
        return [node]
    a, b = inputs
    rank = len(b.shape)
    if len(a.shape) == rank and a.dims == (rank - 2,) and b.dims == (rank - 1,):
        if b.labels.numel() == 1:
            return _weighted(node, b.shape)
        if a.labels.numel() == 1 == a.shape[-2] and not a.common:
            return _weighted(node, a.shape, first=True)
    if len(a.shape) == rank and a.dims == (rank - 1,) and b.dims == (rank - 2,) and a.shape[-2] == 1:
        return _weighted(
            node, a.shape, first=True
        )  # units with weights, whose sum stays in the place of their part
    crossed = _crossed(a, b)
    if last and crossed == {0: rank - 2, 1: rank - 1}:
        return [dataclasses.replace(node, attributes={"weights": True})]
    if crossed:
        return _product(node, crossed, inputs, len(a.shape) == rank > 3, back=len(crossed) == 1)
    if len(a.shape) == rank and a.dims == (rank - 1,) and b.dims == (rank - 2,):  # queries with keys
        spare = _spare([a, b])
        if spare or rank == 3:
            return _product(node, {0: rank - 1, 1: rank - 2}, inputs, spare, back=False)
        if ahead := _ahead([a, b]):
            return _product(node, {0: rank - 1, 1: rank - 2}, inputs, True, False, ahead)
    turned = b.labels.numel() == 1 and b.dims == (len(b.shape) - 3,) and a.dims == (len(a.shape) - 2,)
    if turned and (len(b.shape) == len(a.shape) + 1 or (len(a.shape) == len(b.shape) and _spare([a]))):
        return _product(node, {0: len(a.shape) - 2}, inputs, len(a.shape) == len(b.shape), back=True)
    scored = a.labels.numel() == 1 and a.dims == (len(a.shape) - 3,)
    if (
        scored
        and b.dims == (rank - 1,)
        and (len(a.shape) == rank + 1 or (len(a.shape) == rank and _spare([b])))
    ):
        return _product(node, {1: rank - 1}, inputs, len(a.shape) == rank, back=True)
    ahead = _ahead([a, b]) if a.labels.numel() == 1 and b.dims == (rank - 1,) else None
    if ahead and a.dims == (ahead,):
        return _product(node, {1: rank - 1}, inputs, True, True, ahead)
    return [node]


def _one_of_pairs(node: Node, value: Value) -> bool:
    """Whether it is another view, (n, p, q), of one unit for every two places, (n, p * q, 1) or (n, p, q, 1) (GAT)."""
    rank, a = len(value.shape), node.attributes
    if value.dims != (rank - 1,) or value.shape[-1] != 1 or value.common or value.held:
        return False
    if node.operation == "select":
        return rank == 4 and a["dim"] % rank == 3
    plain = a["atoms"][0] == [1] == a["atoms"][-1] and a["order"] == list(range(4))
    return plain and a["groups"] == [1, 1, 2]


def _face_to_face(a: Value, b: Value) -> bool:
    """Whether each is one unit for each place, on rows and on columns: scores of every two places (GAT)."""
    single = all(own.labels.numel() == 1 and not (own.common or own.held) for own in (a, b))
    return single and len(a.shape) == len(b.shape) == 3 and {a.dims, b.dims} == {(1,), (2,)}


def _of_places(a: Value, b: Value) -> int:
    """Of units that meet places of others (kernels made for each place, involution with one group): a dimension of one
    entry ahead of both, which can be that of their one part; or 0."""
    if len(a.shape) != len(b.shape) or a.common or b.common or not len(a.dims) == len(b.dims) == 1:
        return 0
    (p,), (q,) = a.dims, b.dims
    meets = a.shape[q] == 1 < b.shape[p] or b.shape[p] == 1 < a.shape[q]
    ahead = [d for d in range(1, min(p, q)) if a.shape[d] == b.shape[d] == 1]
    return ahead[-1] if p != q and meets and ahead else 0


def _weighted(node: Node, shape: Sequence[int], first: bool = False) -> list[Node]:
    """A sum over places, each with a weight, as a product and a sum. shape: of the weights.

    (..., units, places) times (..., places, 1), or, first, (..., 1, places) times (..., places, units).
    """
    turned, times, rank = f"{node.name}_turned", f"{node.name}_times", len(shape)
    groups = [[d] for d in (*range(rank - 2), rank - 1, rank - 2)]
    weights, values = node.inputs if first else node.inputs[::-1]
    return [
        rearranged(turned, weights, [[n] for n in shape], groups),
        Node(times, "multiply", (values, turned)),
        Node(node.name, "sum", (times,), {"dims": [rank - 2 if first else rank - 1], "keepdim": True}),
    ]


def _crossed(a: Value, b: Value) -> dict[int, int]:
    """Of a product of units with units that are all of one head, or of one with such a product: what is to be moved.

    Linear attention, and attention between channels (stages.core.graph.crossed).
    """
    last, rank = len(b.shape) - 1, len(a.shape)
    if a.beside is None and b.beside is None and (rank == 3 or _spare([a, b])):
        both = rank == last + 1 and a.dims == (rank - 2,) and b.dims == (last,)
        return {0: rank - 2, 1: last} if both and b.labels.numel() > 1 else {}
    if b.beside is not None and a.beside is None and rank == last and a.dims == (rank - 1,):
        return {0: rank - 1}
    if a.beside is not None and b.beside is None and rank == last + 2 and b.dims == (last - 1,):
        return {1: last - 1}
    return {}


def _lifted(node: Node, value: Value) -> Node:
    """What moves entries along the last dimensions, of scores that were given a dimension for their one head."""
    a, at = node.attributes, len(value.shape) - 3
    if node.operation == "expand":
        short = len(a["sizes"]) == len(value.shape) - 1
        sizes = [*a["sizes"][:at], -1, *a["sizes"][at:]] if short else a["sizes"]
        return dataclasses.replace(node, attributes={**a, "sizes": sizes})
    alone = all(len(own) == 1 for own in a["atoms"][:at]) and all(n == 1 for n in a["groups"][:at])
    plain = alone and a["order"][:at] == list(range(at))
    if len(value.shape) != len(a["atoms"]) + 1 or value.dims != (at,) or not plain:
        return node
    attributes = {
        "atoms": [*a["atoms"][:at], [1], *a["atoms"][at:]],
        "free": [*a["free"][:at], None, *a["free"][at:]],
        "order": [*range(at + 1), *(i + 1 for i in a["order"][at:])],
        "groups": [1, *a["groups"]],
    }
    return dataclasses.replace(node, attributes=attributes)


def _whole(node: Node, value: Value) -> list[Node]:
    """What looks at all units of a value, or at neighbours among them: they are one part, as a head's are."""
    if value.common or len(value.dims) != 1:
        return [node]
    (dim,), shape, name = value.dims, value.shape, f"{node.name}_part"
    apart = to_heads(name, node.inputs[0], shape, dim, False, dim)
    if node.operation in ("local_response_norm", "softmax"):
        attributes = {**node.attributes, "part": True}
        if node.operation == "softmax":
            if node.attributes["dim"] % len(shape) != dim:
                return [node]
            attributes = {"dim": dim - len(shape)}
        inside = dataclasses.replace(node, name=f"{name}s", inputs=(name,), attributes=attributes)
        return [apart, inside, from_heads(node.name, inside.name, shape, dim, False, dim)]
    if [d % len(shape) for d in node.attributes["dims"]] != [dim] or not node.attributes["keepdim"]:
        return [node]
    # the part stays in the place of its units
    attributes = {**node.attributes, "dims": [dim + 1], "keepdim": False}
    return [apart, dataclasses.replace(node, inputs=(name,), attributes=attributes)]


def _on_last(value: Value) -> bool:
    return value.dims == (len(value.shape) - 1,)


def _spare(values: Sequence[Value]) -> bool:
    """Whether the dimension before the last two has one entry, which can be the heads'."""
    return all(len(value.shape) > 3 and value.shape[-3] == 1 for value in values)


def _ahead(values: Sequence[Value]) -> int | None:
    """A dimension of one entry further ahead, of heads that windows follow (Hiera)."""
    rank = len(values[0].shape)
    if any(len(value.shape) != rank for value in values):
        return None
    return next((d for d in range(rank - 4, 0, -1) if all(own.shape[d] == 1 for own in values)), None)


def _attention(node: Node, inputs: Sequence[Value], masked: Sequence[int]) -> list[Node]:
    spare, rank = _spare(inputs[:3]), len(inputs[0].shape)
    masks = [value.shape for value in inputs[3:]] + ([masked] if masked else [])
    ahead = None if spare else _ahead(inputs[:3])
    if not (spare or ahead) and any(len(shape) > 2 for shape in masks):
        return [node]  # it would lie on another dimension
    return _product(node, dict.fromkeys(range(3), rank - 1), inputs, spare or bool(ahead), True, ahead)


def _product(
    node: Node,
    moved: Mapping[int, int],
    inputs: Sequence[Value],
    spare: bool,
    back: bool,
    ahead: int | None = None,
) -> list[Node]:
    """moved: {number of an input: the dimension of its units}. back: whether the output has its units moved back.

    ahead: the dimension of heads where it is not the one before the last two.
    """
    nodes, names = [], list(node.inputs)
    for i, dim in moved.items():
        names[i] = f"{node.name}_head{i}"
        nodes.append(to_heads(names[i], node.inputs[i], inputs[i].shape, dim, spare, ahead))
    if not back:
        return [*nodes, dataclasses.replace(node, inputs=tuple(names))]
    whole = f"{node.name}_heads"
    nodes.append(dataclasses.replace(node, name=whole, inputs=tuple(names)))
    rank = min(len(v.shape) for v in inputs) if node.operation == "matmul" else len(inputs[0].shape)
    rows, columns = inputs[0].shape[-2], inputs[2 if len(inputs) > 2 else 1].shape[-1]
    lead = list(inputs[1].shape[: rank - 2])
    at = rank - 2 if rank - 2 in (moved.get(0), moved.get(1)) else rank - 1
    return [*nodes, from_heads(node.name, whole, [*lead, rows, columns], at, spare, ahead)]


def last_products_of(graph: Graph) -> set[str]:
    """Products that no other reads through what keeps their entries: normalised, scaled, turned."""
    users, reaching = graph.users(), set[str]()
    for node in reversed(graph.nodes[1:]):
        plain = OPERATIONS[node.operation].rule is rules.same or node.operation in (
            "softmax",
            "rearrange",
            *REDUCTIONS,
        )
        if node.operation in ("matmul", "attention") or (
            plain and any(u.name in reaching for u in users[node.name])
        ):
            reaching.add(node.name)
    products = [node for node in graph.nodes if node.operation == "matmul"]
    return {node.name for node in products if not any(user.name in reaching for user in users[node.name])}


def scores_of(graph: Graph) -> set[str]:
    """What only moves entries by which a product sums over places, once they are squashed or masked."""
    users, reaching = graph.users(), set[str]()
    for node in reversed(graph.nodes[1:]):
        kept = OPERATIONS[node.operation].rule is rules.same or node.operation == "softmax"
        ends = [
            user.operation == "matmul" and user.inputs[0] == node.name != user.inputs[1]
            for user in users[node.name]
            if user.name not in reaching or user.operation in ("rearrange", "select")
        ]
        if users[node.name] and all(ends) and (kept or node.operation in ("rearrange", "select")):
            reaching.add(node.name)
    return {
        node.name
        for node in graph.nodes
        if node.name in reaching and node.operation in ("rearrange", "select")
    }
