"""Weight matching (Git Re-Basin, Ainsworth et al. 2023, section 3.2): coordinate ascent over groups.

The objective is the inner product of the reference's weights and the other network's, units in the reference's
order. Given all other groups' order it is linear in one group's, so each step is an assignment. Running statistics
do not count: they are not weights.

Where units lie in parts (heads, groups of a convolution or a norm), a step puts the parts and the units inside them in
order at once: the gain of a pair of parts is what the best order inside the pair gives (stages.match.assign). The
kernel of a grouped convolution has units of one part on both its axes, so that it is linear in the order of either
but not of both: there the pair is solved by turns, from what the other weights say, and keeps the order it has where
that is better.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.core.units.groups import Axis, Inner, PermutationSpec, Span, State, reorder_inside, span_index
from stages.core.units.matching import inside_order
from stages.match.assign import Assigner, assign_inside, gained, part_pairs
from stages.match.gains import Gains
from stages.match.turns import Kernel, solve_pairs, take_turns, worth_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def match_weights(
    spec: PermutationSpec,
    states: Sequence[State],
    generator: torch.Generator,
    sweeps: int = 100,
    tolerance: float = 1e-12,
) -> tuple[dict[str, Tensor], list[float]]:
    """Match N networks; network 0 is the reference. With N > 2 each is aligned to the mean of the others.

    Tensors that are left out of the states, or have not the same shape in all, do not count. Returns
    ({group: int64 (N, d), inner: int64 (N, parts, size)}, the objective after each sweep, which never falls).
    """
    networks = len(states)
    units = {name: torch.arange(g.size).repeat(networks, 1) for name, g in spec.free.items()}
    units |= {name: torch.arange(i.size).repeat(networks, i.parts, 1) for name, i in spec.inner.items()}
    for m in range(1, networks) if networks > 2 else ():  # a start: each to those before it
        ascend(WeightProblem(spec, states[: m + 1]), units, [m], generator, sweeps, tolerance)
    return units, ascend(WeightProblem(spec, states), units, range(1, networks), generator, sweeps, tolerance)


def ascend(
    problem: "WeightProblem",
    units: Mapping[str, Tensor],
    networks: Sequence[int],
    generator: torch.Generator,
    sweeps: int = 100,
    tolerance: float = 1e-12,
) -> list[float]:
    """Improve the order of some networks in place, group by group in random order, until a sweep gains nothing.

    A group is left out while nothing has moved that its gains depend on: it would stay as it is.
    """
    names, coupled = list(problem.spec.ordered), problem.coupled()
    objectives, clock = [problem.objective(units)], 0
    visited, moved = dict[tuple[str, int], int](), dict[tuple[str, int], int]()
    for _ in range(sweeps):
        whole = 0.0
        for m in networks:
            for name in (names[i] for i in torch.randperm(len(names), generator=generator).tolist()):
                clock += 1
                seen = [(o, n) for o in coupled[name] for n in networks if (o, n) != (name, m)]
                seen += [(name, m)] if problem.self_coupled(name) else []
                last = visited.get((name, m), -1)
                if last >= 0 and all(moved.get(own, -1) < last for own in seen):
                    continue
                visited[name, m] = clock
                change = problem.improve(units, name, m)
                if change > 0:
                    whole, moved[name, m] = whole + change, clock
        objectives.append(objectives[-1] + whole)
        if objectives[-1] - objectives[-2] <= tolerance * abs(objectives[-1]):
            break
    return objectives


class WeightProblem:
    """The weights of N networks, and how they look in the reference's order."""

    def __init__(self, spec: PermutationSpec, states: Sequence[State]) -> None:
        self.spec = spec
        self.on: dict[str, list[tuple[Inner, Span]]] = {}  # parameter -> the units on its axes
        self.inside: dict[str, Inner] = {}  # kernel of a grouped convolution -> the units that its rows read
        for name in spec.ordered:
            for inner in spec.contents(name):
                for span in inner.spans:
                    if self._counts(span.axis.parameter, states):
                        self.on.setdefault(span.axis.parameter, []).append((inner, span))
                for parameter in inner.inside:
                    if self._counts(parameter, states):
                        self.on.setdefault(parameter, [])
                        self.inside[parameter] = inner
        self.states = [{p: state[p].detach().cpu().double() for p in self.on} for state in states]
        self._gains = Gains(self.states, self.on)
        self._assigners: dict[tuple[str, int], Assigner] = defaultdict(Assigner)

    def _counts(self, parameter: str, states: Sequence[State]) -> bool:
        shapes = {tuple(state[parameter].shape) if parameter in state else None for state in states}
        return not parameter.endswith(STATISTICS) and len(shapes) == 1 and None not in shapes

    def placed(
        self, units: Mapping[str, Tensor], parameter: str, network: int, skip: Span | None = None
    ) -> Tensor:
        """A network's tensor with its axes in the reference's order; the axis span ``skip`` stays as it is."""
        tensor = self.states[network][parameter]
        if network == 0:
            return tensor
        for inner, span in self.on[parameter]:
            if span != skip:
                index = torch.arange(tensor.shape[span.axis.dim])
                order = span_index(inside_order(units, inner, network), span)
                index[span_index(torch.arange(inner.parts * inner.size), span)] = order
                tensor = tensor.index_select(span.axis.dim, index)
        if parameter in self.inside:
            tensor = reorder_inside(tensor, units[self.inside[parameter].name][network])
        return tensor

    def reference(self, units: Mapping[str, Tensor], parameter: str, network: int) -> Tensor:
        """The sum of the other networks' tensors, in the reference's order."""
        return sum(self.placed(units, parameter, n) for n in range(len(self.states)) if n != network)

    def unit_weights(
        self, units: Mapping[str, Tensor], inner: Inner, network: int, placed: bool = True
    ) -> Tensor:
        """The weights of each of the units, (parts * size, entries), other axes in the reference's order.

        placed: units in the reference's order too, else in the network's own. Kernels of grouped convolutions are
        left out: how they look depends on the order inside parts on both axes.
        """
        size = inner.parts * inner.size
        rows = [
            _unit_rows(self.placed(units, span.axis.parameter, network, None if placed else span), span, size)
            for span in self._linear(inner)
        ]
        return torch.cat(rows, 1) if rows else torch.zeros(size, 0, dtype=torch.float64)

    def _linear(self, inner: Inner) -> list[Span]:
        """Where the units' weights are linear in their order."""
        return [s for s in inner.spans if s.axis.parameter in self.on and s.axis.parameter not in self.inside]

    def coupled(self) -> dict[str, set[str]]:
        """For each group those whose order its gains can depend on: the units of both lie on one tensor."""
        tensors = {name: self._tensors(name) for name in self.spec.ordered}
        return {name: {o for o, theirs in tensors.items() if own & theirs} for name, own in tensors.items()}

    def self_coupled(self, name: str) -> bool:
        """Whether a group's gains can depend on its own order."""
        contents = self.spec.contents(name)
        return bool(self._twice(contents)) or any(own in contents for own in self.inside.values())

    def _tensors(self, name: str) -> set[str]:
        contents = self.spec.contents(name)
        spans = {span.axis.parameter for inner in contents for span in inner.spans}
        return (spans | {p for p, inner in self.inside.items() if inner in contents}) & set(self.on)

    def improve(self, units: Mapping[str, Tensor], name: str, network: int) -> float:
        """Give one group of one network its best order, also inside its units, if that is better than what it has.

        Returns how much better.
        """
        contents = self.spec.contents(name)
        parts, every = self.spec.groups[name].size, torch.arange(self.spec.groups[name].size)
        gains = {
            inner.name: part_pairs(self._gains.of(units, inner, self._linear(inner), network), parts)
            for inner in contents
        }
        kernels = self._kernels(units, contents, network)
        old = units[name][network].clone() if name in units else every
        kept = {i.name: units[i.name][network].clone() for i in contents if i.name != name}
        present = {what: kept.get(what, torch.zeros(parts, 1, dtype=torch.int64)) for what in gains}
        if kernels:
            orders, worth = solve_pairs(gains, kernels, parts)
            turned, at = take_turns(gains, kernels, every, old, present)
            better = at >= worth[every, old]
            worth[every, old] = torch.maximum(at, worth[every, old])
            for what, own in orders.items():
                own[every[better], old[better]] = turned[what][better]
            before = worth_of(gains, kernels, every, old, present).sum()
        else:
            orders = {what: assign_inside(own) for what, own in gains.items()}
            worth = sum(gained(gains[what], own) for what, own in orders.items())
            before = sum(gained(gains[what][every, old], own).sum() for what, own in present.items())
        new = self._assigners[name, network](worth) if name in units else every
        inside = {what: own[every, new] for what, own in orders.items()}
        if kernels:  # those that were not improved by turns, and are chosen
            inside, found = take_turns(gains, kernels, every, new, inside)
            change = float(found.sum() - before)
        else:
            change = float(worth[every, new].sum() - before)
        if change <= 0:
            return 0.0
        twice = self._twice(contents)
        value = self._part(units, twice, network) if twice else 0.0
        _set(
            units,
            network,
            {name: new, **{what: own for what, own in inside.items() if what in kept}},
        )
        if not twice:
            return change
        change = self._part(units, twice, network) - value
        if change <= 0:
            _set(units, network, {name: old, **kept})
        return max(change, 0.0)

    def _kernels(
        self, units: Mapping[str, Tensor], contents: Sequence[Inner], network: int
    ) -> list[tuple[Kernel, Kernel | None]]:
        """The kernels of grouped convolutions that read these units, seen from the units they read and they write."""
        found = []
        for inner in contents:
            for parameter in (p for p, own in self.inside.items() if own is inner):
                shape = self.states[0][parameter].shape
                view = (inner.parts, shape[0] // inner.parts, inner.size, -1)
                theirs = self.reference(units, parameter, network).reshape(view)
                mine = self.states[network][parameter].reshape(view)
                rows = [
                    own.name  # not where what it writes has no order inside its parts
                    for own, span in self.on[parameter]
                    if span.axis == Axis(parameter, 0) and own.size == view[1]
                ]
                across = rows[0] if rows else None
                read = Kernel(inner.name, across, theirs.transpose(1, 2), mine.transpose(1, 2))
                found.append((read, Kernel(across, inner.name, theirs, mine) if across else None))
        return found

    def _twice(self, contents: Sequence[Inner]) -> list[str]:
        """All parameters of a group's units, if one has them on several axes: the objective may not be linear."""
        spans = {span.axis for inner in contents for span in self._linear(inner)}
        parameters = {axis.parameter for axis in spans}
        kernels = {parameter for parameter, inner in self.inside.items() if inner in contents}
        return sorted(parameters | kernels) if len(parameters) < len(spans) else []

    def _part(self, units: Mapping[str, Tensor], parameters: Sequence[str], network: int) -> float:
        return sum(
            float((self.reference(units, p, network) * self.placed(units, p, network)).sum())
            for p in parameters
        )

    def objective(self, units: Mapping[str, Tensor]) -> float:
        """Sum over pairs of networks of the inner products of their tensors."""
        total = 0.0
        for parameter in self.on:
            tensors = [self.placed(units, parameter, m) for m in range(len(self.states))]
            whole = sum(tensors)
            total += float((whole * whole).sum() - sum((t * t).sum() for t in tensors)) / 2
        return total


def _set(units: Mapping[str, Tensor], network: int, orders: Mapping[str, Tensor]) -> None:
    for name, order in orders.items():
        if name in units:  # not where the parts are fixed
            units[name][network] = order


def _unit_rows(tensor: Tensor, span: Span, size: int) -> Tensor:
    """A tensor as one row per unit: (size, everything else)."""
    own = tensor.movedim(span.axis.dim, 0)[span_index(torch.arange(size), span)]
    return own.reshape(size, -1)
