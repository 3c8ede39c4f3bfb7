"""Self-attention that a forward writes out: one Linear to queries, keys and values, and the fused product.

    qkv(x).reshape(n, tokens, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0) -> scaled_dot_product_attention
    -> transpose(1, 2).reshape(n, tokens, heads * d)

is found as a whole, because no step of it alone keeps units on one dimension.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from stages.core.tracing.shapes import Observed

PACKED = [".query", ".key", ".value"]  # the groups of units that a Linear to all three writes, side by side


@dataclass(frozen=True)
class Attention:
    """packed: the node that gives queries, keys and values side by side. inside: nodes between it and the result."""

    packed: torch.fx.Node
    head_dim: int
    inside: frozenset[torch.fx.Node]


def find_attention(
    traced: torch.fx.GraphModule, observed: Observed
) -> Iterator[tuple[torch.fx.Node, Attention]]:
    """Each written-out attention, with the node of its result."""
    modules = dict(traced.named_modules())
    for fx in traced.graph.nodes:
        if fx.target is F.scaled_dot_product_attention:
            found = _around(fx, modules, observed)
            if found is not None:
                yield found


def _around(
    fx: torch.fx.Node, modules: dict[str, nn.Module], observed: Observed
) -> tuple[torch.fx.Node, Attention] | None:
    plain = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    if len(fx.args) != 3 or any(fx.kwargs.get(k, v) != v for k, v in plain.items()):
        return None
    inside = {fx}
    sources = [_through_identities(arg, modules, inside) for arg in fx.args]
    if not all(s.target is operator.getitem and s.args[1] == i for i, s in enumerate(sources)):
        return None
    unbind = sources[0].args[0]
    if not all(s.args[0] is unbind for s in sources) or unbind.target not in ("unbind", torch.unbind):
        return None
    if unbind.args[1:] not in ((), (0,)) or unbind.kwargs.get("dim", 0) != 0:
        return None
    permute = unbind.args[0]
    if permute.target not in ("permute", torch.permute):
        return None
    dims = permute.args[1:] if len(permute.args) > 2 else tuple(permute.args[1])
    apart = permute.args[0]
    back = _only_user(fx)
    result = None if back is None else _only_user(back)
    if tuple(dims) != (2, 0, 3, 1, 4) or apart.target not in ("reshape", "view") or result is None:
        return None
    shape, packed = observed.shape(apart), apart.args[0]
    if shape is None or len(shape) != 5 or shape[2] != 3 or shape[0] != "batch":
        return None
    n, tokens, _, heads, d = shape
    if observed.shape(packed) != (n, tokens, 3 * heads * d) or observed.shape(result) != (
        n,
        tokens,
        heads * d,
    ):
        return None
    if back.target not in ("transpose", torch.transpose) or set(back.args[1:]) != {1, 2}:
        return None
    inside |= {*sources, unbind, permute, apart, back}
    alone = all(user in inside or user is result for node in inside for user in node.users)
    return (result, Attention(packed, d, frozenset(inside))) if alone else None


def _through_identities(
    fx: torch.fx.Node, modules: dict[str, nn.Module], inside: set[torch.fx.Node]
) -> torch.fx.Node:
    while fx.op == "call_module" and type(modules[fx.target]) in (nn.Identity, nn.Dropout):
        inside.add(fx)
        fx = fx.args[0]
    return fx


def _only_user(fx: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(fx.users)) if len(fx.users) == 1 else None
