"""One linear map for all heads, over what is inside them: tables of relative positions, random features, maps of heads.

It is a product with a table (``matmul_parameter``): what it gives are places of each head, and a merged network, where
separate heads are those of one network, has a table for each.
"""

import dataclasses

from stages.core.graph.axes import Value
from stages.core.graph.nodes import Node
from stages.core.graph.part_moves import rearranged


def inside_heads(value: Value) -> bool:
    """Whether the last dimension holds what is inside heads, which lie on another."""
    plain = not value.common and value.across is None and value.beside is None
    return plain and len(value.dims) == 2 and value.dims[0] > 0 and value.dims[1] == len(value.shape) - 1


def mapped_inside(node: Node, value: Value, width: int) -> list[Node]:
    """The linear map as a product with a table, and what it adds. width: of its output.

    Heads that lie just before what is inside them change places with the rows, or get a row.
    """
    rank, shape, nodes, source = len(value.shape), list(value.shape), [], node.inputs[0]
    beside = value.dims[0] == rank - 2
    ahead = [[d] for d in range(rank - 3)] + [[rank - 2], [rank - 3], [rank - 1]]
    if beside:
        groups = ahead if rank > 3 else [[0], [1], [], [2]]
        nodes.append(rearranged(f"{node.name}_rows", source, [[n] for n in shape], groups))
        source = nodes[-1].name
    steps = [("matmul_parameter", {"turned": True}, {"value": node.parameters["weight"]})]
    if "bias" in node.parameters:
        steps.append(("add_parameter", {}, {"value": node.parameters["bias"]}))
    for operation, attributes, parameters in steps:
        name = f"{node.name}_{operation.partition('_')[0]}"
        nodes.append(Node(name, operation, (source,), attributes, parameters))
        source = name
    if beside and rank > 3:
        sizes = [*shape[: rank - 3], shape[rank - 2], shape[rank - 3], width]
        nodes.append(rearranged(node.name, source, [[n] for n in sizes], ahead))
    elif beside:
        nodes.append(
            rearranged(node.name, source, [[shape[0]], [shape[1]], [1], [width]], [[0], [1, 2], [3]])
        )
    else:
        nodes[-1] = dataclasses.replace(nodes[-1], name=node.name)
    return nodes
