"""Parts that are selected out of a value before its entries are put in another order, not after.

Queries, keys and values are mostly one layer's output, which is seen as (images, places, 3, heads, units) and put in
the order (3, images, heads, places, units), of which each is selected. Where the heads of values are not those of
queries and keys (talking heads: a linear map over heads lies between), the whole has units on two dimensions, each of
the three on one alone.
"""

import dataclasses
import math

import torch

from stages.core.graph.nodes import Graph, Node


def selected_first(graph: Graph) -> Graph:
    """The same network: what selects along one factor of a rearranged value cuts the value before it is rearranged."""
    users, nodes, gone = graph.users(), list[Node](), dict[str, Node]()
    for node in graph.nodes:
        if (
            node.operation == "rearrange"
            and node is not graph.output
            and _factor(node, users[node.name]) is not None
        ):
            gone[node.name] = node
        elif node.operation == "select" and node.inputs[0] in gone:
            nodes += _cut(gone[node.inputs[0]], node)
        else:
            nodes.append(node)
    return Graph(tuple(nodes))


def _factor(node: Node, users: list[Node]) -> tuple[int, int] | None:
    """Dimension and place of the factor that all users of a rearranged value select along, if it is one of several."""
    a, dims = node.attributes, {user.attributes["dim"] for user in users if user.operation == "select"}
    if len(dims) != 1 or any(user.operation != "select" for user in users):
        return None
    dim = dims.pop() % len(a["groups"])
    start = sum(a["groups"][:dim])
    if a["groups"][dim] != 1:
        return None
    line = [(d, p) for d, own in enumerate(a["atoms"]) for p in range(len(own))]
    d, p = line[a["order"][start]]
    return None if len(a["atoms"][d]) == 1 or a["free"][d] is not None else (d, p)


def _cut(node: Node, select: Node) -> list[Node]:
    """What is selected, cut out of what ``node`` rearranges, and then rearranged without that factor."""
    a, (d, p) = node.attributes, _factor(node, [select])
    own, name = a["atoms"][d], f"{select.name}_cut"
    entries = torch.arange(math.prod(own)).view(own).select(p, select.attributes["index"]).flatten().tolist()
    cut = {"dim": d, "start": entries[0], "stop": entries[-1] + 1, "step": 1}
    if entries == list(range(entries[0], entries[-1] + 1)):
        first = Node(name, "slice", node.inputs, cut)
    else:
        first = Node(name, "pick", node.inputs, {"dim": d, "index": entries})
    number = sum(map(len, a["atoms"][:d])) + p
    dim = select.attributes["dim"] % len(a["groups"])
    attributes = {
        **a,
        "atoms": [[n for q, n in enumerate(own) if (e, q) != (d, p)] for e, own in enumerate(a["atoms"])],
        "order": [i - (i > number) for i in a["order"] if i != number],
        "groups": [*a["groups"][:dim], *a["groups"][dim + 1 :]],
    }
    return [first, dataclasses.replace(node, name=select.name, inputs=(name,), attributes=attributes)]
