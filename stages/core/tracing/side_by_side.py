"""Parts of a dimension that are put side by side on another one, as a change of places.

Heads are put beside images by ``torch.cat(torch.split(q, width, 2), 0)``, and back by ``torch.cat(torch.split(y, n, 0),
2)``: both only cut a dimension in two and move one of the two, which views and a permutation say too.
"""

import torch
import torch.fx

from stages.core.tracing.export import opname
from stages.core.tracing.rewriting import called


def places_changed(graph: torch.fx.Graph) -> None:
    """Rewrite a graph of ATen calls in place."""
    changed = False
    for node in list(graph.nodes):
        if node.op == "call_function" and opname(node) in ("cat", "concat", "concatenate"):
            changed = _written_as_views(graph, node) or changed
    if changed:
        graph.eliminate_dead_code()


def _written_as_views(graph: torch.fx.Graph, node: torch.fx.Node) -> bool:
    """Whether a call puts all equal parts of one value side by side, and is views now."""
    parts, dim = list(node.args[0]), node.args[1] if len(node.args) > 1 else 0
    whole = parts[0].args[0] if parts[0].op == "call_function" and opname(parts[0]) == "getitem" else None
    split = whole is not None and opname(whole) in ("split", "split_with_sizes", "chunk")
    if not split or [own.args for own in parts] != [(whole, i) for i in range(len(whole.meta["val"]))]:
        return False
    source, shape, rank = whole.args[0], list(parts[0].meta["val"].shape), len(parts[0].meta["val"].shape)
    if any(list(own.meta["val"].shape) != shape for own in parts):
        return False
    before, dim = list(source.meta["val"].shape), dim % rank
    cut = next((d for d in range(rank) if before[d] != shape[d]), dim)
    if cut == dim:
        return False
    apart = [*before[:cut], len(parts), *shape[cut:]]
    order = [d for d in range(rank + 1) if d != cut]
    order.insert(order.index(dim + (dim > cut)), cut)
    aten, seen = torch.ops.aten, source
    joined = list(node.meta["val"].shape)
    with graph.inserting_before(node):
        for target, sizes in (
            (aten.reshape.default, apart),
            (aten.permute.default, order),
            (aten.reshape.default, joined),
        ):
            seen = called(graph, node, target, seen, sizes)
    node.replace_all_uses_with(seen)
    return True
