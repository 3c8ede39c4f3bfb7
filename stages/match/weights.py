"""Weight matching (Git Re-Basin, Ainsworth et al. 2023, section 3.2): coordinate ascent over groups.

The objective is the inner product of the reference's weights and the other network's, units in the reference's
order. Given all other groups' order it is linear in one group's, so each step is an assignment. Running statistics
do not count: they are not weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.core.spec import PermutationSpec, Span, State, span_index
from stages.match.assign import assign

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
    ({group: int64 (N, d)}, the objective after each sweep, which never falls).
    """
    networks = len(states)
    units = {name: torch.arange(g.size).repeat(networks, 1) for name, g in spec.free.items()}
    for m in range(1, networks) if networks > 2 else ():  # a start: each to those before it
        _ascend(WeightProblem(spec, states[: m + 1]), units, [m], generator, sweeps, tolerance)
    return units, _ascend(
        WeightProblem(spec, states), units, range(1, networks), generator, sweeps, tolerance
    )


def _ascend(
    problem: "WeightProblem",
    units: Mapping[str, Tensor],
    networks: Sequence[int],
    generator: torch.Generator,
    sweeps: int,
    tolerance: float,
) -> list[float]:
    """Improve the order of some networks in place, group by group in random order, until a sweep gains nothing."""
    names = list(units)
    objectives = [problem.objective(units)]
    for _ in range(sweeps):
        for m in networks:
            for index in torch.randperm(len(names), generator=generator).tolist():
                problem.improve(units, names[index], m)
        objectives.append(problem.objective(units))
        if objectives[-1] - objectives[-2] <= tolerance * abs(objectives[-1]):
            break
    return objectives


class WeightProblem:
    """The weights of N networks, and how they look in the reference's order."""

    def __init__(self, spec: PermutationSpec, states: Sequence[State]) -> None:
        self.spec = spec
        self.on: dict[str, list[tuple[str, Span]]] = {}  # parameter -> free groups on its axes
        for name, group in spec.free.items():
            for span in group.spans:
                parameter = span.axis.parameter
                shapes = {tuple(state[parameter].shape) if parameter in state else None for state in states}
                if not parameter.endswith(STATISTICS) and len(shapes) == 1 and None not in shapes:
                    self.on.setdefault(parameter, []).append((name, span))
        self.states = [{p: state[p].detach().cpu().double() for p in self.on} for state in states]

    def placed(
        self, units: Mapping[str, Tensor], parameter: str, network: int, skip: Span | None = None
    ) -> Tensor:
        """A network's tensor with its axes in the reference's order; the axis span ``skip`` stays as it is."""
        tensor = self.states[network][parameter]
        for name, span in self.on[parameter]:
            if span != skip and network > 0:
                index = torch.arange(tensor.shape[span.axis.dim])
                order = span_index(units[name][network], span)
                index[span.start : span.start + len(order)] = order
                tensor = tensor.index_select(span.axis.dim, index)
        return tensor

    def reference(self, units: Mapping[str, Tensor], parameter: str, network: int) -> Tensor:
        """The sum of the other networks' tensors, in the reference's order."""
        return sum(self.placed(units, parameter, n) for n in range(len(self.states)) if n != network)

    def unit_weights(
        self, units: Mapping[str, Tensor], name: str, network: int, placed: bool = True
    ) -> Tensor:
        """All weights of each unit of a group, (d, entries), other axes in the reference's order.

        placed: units in the reference's order too, else in the network's own.
        """
        group = self.spec.groups[name]
        return torch.cat(
            [
                _unit_rows(
                    self.placed(units, span.axis.parameter, network, None if placed else span),
                    span,
                    group.size,
                )
                for span in group.spans
                if span.axis.parameter in self.on
            ],
            1,
        )

    def improve(self, units: Mapping[str, Tensor], name: str, network: int) -> None:
        """Give one group of one network its best order, if that is better than the one it has."""
        spans = [s for s in self.spec.groups[name].spans if s.axis.parameter in self.on]
        size = self.spec.groups[name].size
        gain = torch.zeros(size, size, dtype=torch.float64)
        for span in spans:
            parameter = span.axis.parameter
            rows = _unit_rows(self.reference(units, parameter, network), span, size)
            gain += rows @ _unit_rows(self.placed(units, parameter, network, span), span, size).T
        new, old = assign(gain), units[name][network].clone()
        every = torch.arange(size)
        if gain[every, new].sum() <= gain[every, old].sum():
            return
        parameters = sorted({span.axis.parameter for span in spans})
        twice = [p for p in parameters if sum(s.axis.parameter == p for s in spans) > 1]
        if not twice:
            units[name][network] = new
            return
        before = self._part(units, parameters, network)  # a tensor with the group on both axes: not linear
        units[name][network] = new
        if self._part(units, parameters, network) <= before:
            units[name][network] = old

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


def _unit_rows(tensor: Tensor, span: Span, size: int) -> Tensor:
    """A tensor as one row per unit: (size, everything else)."""
    own = tensor.movedim(span.axis.dim, 0).narrow(0, span.start, size * span.block)
    return own.reshape(size, -1)
