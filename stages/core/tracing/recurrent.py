"""Recurrent layers, written out step by step: what torch runs as one call becomes linear maps and what joins them.

The same maps are used at every step; the first state is a constant, or what the forward gives.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

MOST_STEPS = 64  # some ten operations each
Hidden = tuple[Tensor, ...]
Cell = Callable[
    [Tensor, Hidden, Tensor], Hidden
]  # of the maps of the input and of the state; the state's first is given


def _lstm(x: Tensor, state: Hidden, own: Tensor) -> Hidden:
    i, f, g, o = (x + own).chunk(4, -1)
    kept = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(kept), kept


def _gru(x: Tensor, state: Hidden, own: Tensor) -> Hidden:
    (r, z, n), (own_r, own_z, own_n) = x.chunk(3, -1), own.chunk(3, -1)
    z = torch.sigmoid(z + own_z)
    return ((1 - z) * torch.tanh(n + torch.sigmoid(r + own_r) * own_n) + z * state[0],)


CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda x, state, own: (torch.tanh(x + own),),
    "rnn_relu": lambda x, state, own: (torch.relu(x + own),),
}


def _cell(
    step: Cell,
    x: Tensor,
    state: Any,
    wx: Tensor,
    wh: Tensor,
    bx: Tensor | None = None,
    bh: Tensor | None = None,
) -> Any:
    """As torch.lstm_cell and its like: x (n, c) and a state (n, h), or two."""
    given = tuple(state) if isinstance(state, list | tuple) else (state,)
    found = step(F.linear(x, wx, bx), given, F.linear(given[0], wh, bh))
    return found if len(found) > 1 else found[0]


def _layers(
    step: Cell,
    x: Tensor,
    state: Any,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    both: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """As torch.lstm and its like: x (n, t, c) or (t, n, c), states (layers * directions, n, h), perhaps projected."""
    first, each, last = list(state) if isinstance(state, list | tuple) else [state], 4 if biases else 2, []
    projected = len(weights) > each * layers * (1 + both)
    each += projected
    x = x.transpose(0, 1) if batch_first else x
    for layer in range(layers):
        made = []
        for way in range(1 + both):
            at = layer * (1 + both) + way
            named = list(weights[each * at : each * (at + 1)])
            down = named.pop() if projected else None
            wx, wh, bx, bh = [*named, None, None][:4]
            own, steps = tuple(kind[at] for kind in first), []
            maps = F.linear(x, wx, bx).unbind(0)
            for given in reversed(maps) if way else maps:
                own = step(given, own, F.linear(own[0], wh, bh))
                own = own if down is None else (F.linear(own[0], down), *own[1:])
                steps.append(own[0])
            made.append(torch.stack(steps[::-1] if way else steps))
            last.append(own)
        x = torch.cat(made, -1) if both else made[0]
    return (x.transpose(0, 1) if batch_first else x, *(torch.stack(kind) for kind in zip(*last, strict=True)))


def both_ways(name: str, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """A recurrent layer of both directions, by its call, step by step; None for other calls and what stays.

    While torch.export traces it, torch 2.11 has its last states in a wrong shape.
    """
    if name not in CELLS or len(args) != 9 or not isinstance(args[2], list | tuple):
        return None
    x, state, weights, biases, layers, dropout, train, both, batch_first = args
    short = x.dim() == 3 and x.shape[int(batch_first)] <= MOST_STEPS
    if not (both and short):
        return None
    return _layers(CELLS[name], x, state, weights, biases, layers, dropout, train, both, batch_first)


def written_out(
    graph: torch.fx.Graph, name_of: Callable[[torch.fx.Node], str]
) -> dict[Any, Callable[..., Any]]:
    """What torch.export is to write in the place of the recurrent layers of a graph, by call.

    Those of longer sequences than ``MOST_STEPS`` stay: they have no rule.
    """
    found: dict[Any, Callable[..., Any]] = {}
    for node in graph.nodes:
        name = name_of(node) if node.op == "call_function" else ""
        if name in CELLS and node.target._overloadname == "input":
            x, batch_first = node.args[0], node.args[-1]
            steps = x.meta["val"].shape[int(batch_first)]
            if steps <= MOST_STEPS:
                found[node.target] = partial(_layers, CELLS[name])
        elif name.removesuffix("_cell") in CELLS and name.endswith("_cell"):
            found[node.target] = partial(_cell, CELLS[name.removesuffix("_cell")])
    return found
