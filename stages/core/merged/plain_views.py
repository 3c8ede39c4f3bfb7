"""What looks at all units of a value (stages.core.merged.unit_layers: Viewed), written for a plain network."""

from collections.abc import Sequence

import torch
from torch.fx import Proxy

from stages.core.graph.nodes import Node
from stages.core.graph.operations import OPERATIONS, unspread
from stages.core.merged.arrangement import Arrangement, pieces_of
from stages.core.merged.plain_layers import picked
from stages.core.merged.unit_layers import Viewed, reduced_dims


def viewed(node: Node, module: Viewed, x: Proxy, rank: int, arrangement: Arrangement) -> Proxy:
    """The entries of each owner by what is found in the views, the mean of them for those of all. No parameters."""
    dim, a = module.dim, module.attributes
    views = [picked(x, dim, arrangement.view(m).tolist()) for m in range(module.count)]
    pieces, parts = pieces_of(arrangement), []
    if "spread" in a:
        found = [OPERATIONS[node.operation].run([view], {}, unspread(a)) for view in views]
        parts = [repeated(_of(found, p.owner), dim, rank, p.stop - p.start) for p in pieces]
        return torch.cat(parts, dim)
    if node.operation == "normalize":
        lengths = [view.norm(dim=dim, keepdim=True).clamp(min=a["eps"]) for view in views]
    else:
        over = reduced_dims(node, rank)
        means = [view.mean(over, keepdim=True) for view in views]
        spreads = [view.var(over, correction=0, keepdim=True) for view in views]
    for piece in pieces:
        own = x.narrow(dim, piece.start, piece.stop - piece.start)
        if node.operation == "normalize":
            parts.append(own / _of(lengths, piece.owner))
        else:
            parts.append((own - _of(means, piece.owner)) * (_of(spreads, piece.owner) + a["eps"]).rsqrt())
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def repeated(value: Proxy, dim: int, rank: int, size: int) -> Proxy:
    """One entry for all units, as often as ``size``."""
    return value.expand([size if d == dim else -1 for d in range(rank)])


def _of(values: Sequence[Proxy], owner: int) -> Proxy:
    return values[owner] if owner >= 0 else sum(values[1:], values[0]) / len(values)
