"""Cycle-consistent matching of N networks (C2M3, Crisostomi et al. 2024, section 4), by Frank-Wolfe.

Every network m has a map P_m of each group from its units to those of a universe; composed round any cycle of networks
these are the identity. With T_m(W) a network's tensor as the universe sees it, the maps of all groups and networks at
once maximise

    f = sum over tensors, over pairs m < n, of <T_m(W_m), T_n(W_n)>

over doubly stochastic matrices: the gradient is linear in each map, its best vertex a permutation (an assignment), and
along the way to it f is a polynomial of degree four where a tensor has units on two axes, whose best point is exact.
The maps are then rounded to permutations. The universe has the order of the first network, whose maps stay: to number
its units otherwise changes nothing. Without images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stages.core.units.groups import PermutationSpec, Span, State, span_index
from stages.match.assign import assign
from stages.match.weights import STATISTICS, WeightProblem, ascend

Maps = dict[str, Tensor]  # {group: float64 (N, universe, units)}
TOLERANCE = 1e-9  # of the objective, below which a step is the last


def match_universe(
    spec: PermutationSpec, states: Sequence[State], generator: torch.Generator, steps: int = 100
) -> tuple[dict[str, Tensor], list[float]]:
    """Match N networks.

    Tensors that are left out of the states, or have not the same shape in all, do not count. Orders inside parts are
    put by coordinate ascent afterwards. Returns ({group: int64 (N, d), inner: int64 (N, parts, size)}, units in the
    order of network 0; the objective before the first step and after each, which never falls).
    """
    problem, networks = Universe(spec, states), len(states)
    maps = {name: _start(group.size, networks) for name, group in spec.free.items()}
    objectives = [problem.objective(maps)]
    for _ in range(steps):
        towards = {
            name: torch.stack([maps[name][0], *(_vertex(own) for own in G[1:])])
            for name, G in problem.gradient(maps).items()
        }
        maps, found = problem.search(maps, towards, objectives[-1])
        objectives.append(found)
        if objectives[-1] - objectives[-2] <= TOLERANCE * abs(objectives[-1]):
            break
    units = {name: torch.stack([assign(P) for P in own]) for name, own in maps.items()}
    if spec.inner:
        units |= {name: torch.arange(i.size).repeat(networks, i.parts, 1) for name, i in spec.inner.items()}
        ascend(WeightProblem(spec, states), units, range(1, networks), generator)
    return units, objectives


class Universe:
    """The weights of N networks as a universe sees them through soft maps of their units."""

    def __init__(self, spec: PermutationSpec, states: Sequence[State]) -> None:
        self.networks = len(states)
        self.on: dict[str, list[tuple[str, Span]]] = {}  # parameter -> the groups on its axes
        for name, group in spec.free.items():
            for span in group.spans:
                parameter = span.axis.parameter
                shapes = {tuple(state[parameter].shape) if parameter in state else None for state in states}
                if not parameter.endswith(STATISTICS) and len(shapes) == 1 and None not in shapes:
                    self.on.setdefault(parameter, []).append((name, span))
        self.states = [{p: state[p].detach().cpu().double() for p in self.on} for state in states]
        self.degree = 2 * max((len(own) for own in self.on.values()), default=0)

    def seen(self, maps: Maps, parameter: str, network: int, skip: Span | None = None) -> Tensor:
        """T_m(W_m); units of the span ``skip`` stay the network's own."""
        tensor = self.states[network][parameter]
        for name, span in self.on[parameter]:
            if span is not skip:
                tensor = _apply(maps[name][network], tensor, span)
        return tensor

    def objective(self, maps: Maps) -> float:
        """f."""
        total = 0.0
        for parameter in self.on:
            seen = [self.seen(maps, parameter, m) for m in range(self.networks)]
            total += float(sum(seen).square().sum() - sum(own.square().sum() for own in seen)) / 2
        return total

    def gradient(self, maps: Maps) -> Maps:
        """Of f in every map."""
        found = {name: torch.zeros_like(own) for name, own in maps.items()}
        for parameter, own in self.on.items():
            seen = [self.seen(maps, parameter, m) for m in range(self.networks)]
            whole = sum(seen)
            for m in range(self.networks):
                for name, span in own:
                    rows = _rows(self.seen(maps, parameter, m, skip=span), span, maps[name].shape[-1])
                    found[name][m] += _rows(whole - seen[m], span, maps[name].shape[-1]) @ rows.T
        return found

    def search(self, maps: Maps, towards: Maps, now: float) -> tuple[Maps, float]:
        """The best point between the maps, where f is ``now``, and others; and f there."""

        def at(t: float) -> Maps:
            return {name: torch.lerp(own, towards[name], t) for name, own in maps.items()}

        points = (1 - np.cos(np.linspace(0, np.pi, self.degree + 1))) / 2
        values = [now, *(self.objective(at(t)) for t in points[1:])]
        line = np.polynomial.Polynomial.fit(points, values, self.degree)
        turns = line.deriv().roots() if self.degree else np.zeros(0)
        turns = [float(t.real) for t in turns if abs(t.imag) < 1e-9 and 0 < t.real < 1]
        best = max(turns, key=line, default=0.0)
        values = {0.0: values[0], 1.0: values[-1], **({best: self.objective(at(best))} if turns else {})}
        step = max(values, key=values.__getitem__)
        return at(step), values[step]


def _start(size: int, networks: int) -> Tensor:
    """The first network in its own order, the others in the middle of all orders: no order is nearer than another."""
    maps = torch.full((networks, size, size), 1 / size, dtype=torch.float64)
    maps[0] = torch.eye(size)
    return maps


def _vertex(gradient: Tensor) -> Tensor:
    """The permutation matrix that a gradient (universe, units) points at most."""
    return torch.eye(len(gradient), dtype=gradient.dtype)[assign(gradient)]


def _rows(tensor: Tensor, span: Span, size: int) -> Tensor:
    """The entries of each unit on a span: (size, entries)."""
    index = span_index(torch.arange(size), span)
    return tensor.index_select(span.axis.dim, index).movedim(span.axis.dim, 0).reshape(size, -1)


def _apply(P: Tensor, tensor: Tensor, span: Span) -> Tensor:
    """A tensor with the units of a span mapped by P (size, size); other entries stay."""
    index, dim = span_index(torch.arange(len(P)), span), span.axis.dim
    own = tensor.index_select(dim, index).movedim(dim, 0)
    mapped = (P @ own.reshape(len(P), -1)).view(own.shape).movedim(0, dim)
    return tensor.index_copy(dim, index, mapped)
