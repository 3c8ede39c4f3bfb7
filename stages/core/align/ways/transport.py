"""OT Fusion (Singh and Jaggi 2020): soft or exact transport of each network's units to those of the first.

Group by group in the order of the forward pass. What it costs to pair two units is the Euclidean distance of the
weights that write them, their inputs already transported, or of their activations in front of the non-linearity.
All units weigh alike on either side, and there are as many on both, so that exact transport is an assignment.
"""

import numpy as np
import torch
from torch import Tensor

from stages.core.align.alignment import Alignment, GroupAlignment
from stages.core.align.problem import Problem
from stages.core.graph.nodes import oriented
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS


@ALIGNMENTS.register(uses=("features", "regularisation"))
def align_transport(problem: Problem, settings: MatchSettings) -> Alignment:
    """settings.features, settings.regularisation: of Sinkhorn, relative to the largest cost; 0 is exact."""
    alignment = Alignment(problem.networks, {})
    for name, moments in problem.after.items():
        k = moments.sizes[0]
        views, unmerges = [torch.eye(k, dtype=torch.float64)], [torch.eye(k, dtype=torch.float64)]
        for m in range(1, problem.networks):
            cost = unit_cost(problem, alignment, name, m, settings)
            plan = torch.from_numpy(transport(cost.cpu().numpy(), settings.regularisation))  # (k, k)
            views.append(plan / plan.sum(1, keepdim=True))
            unmerges.append((plan / plan.sum(0)).T)
        weights = torch.full((problem.networks, k), 1 / problem.networks, dtype=torch.float64)
        found = GroupAlignment(tuple(views), tuple(unmerges), weights, problem.correlations(name))
        alignment = Alignment(problem.networks, {**alignment.groups, name: found})
    return alignment


def unit_cost(
    problem: Problem, alignment: Alignment, group: str, network: int, settings: MatchSettings
) -> Tensor:
    """Of letting a unit of a network (column) play the part of one of the first (row): (k, k) float64.

    alignment: of the groups in front.
    """
    if settings.features == "weights":
        return _weight_cost(problem, alignment, group, network)
    return _activation_cost(problem, group, network)


def _activation_cost(problem: Problem, group: str, network: int) -> Tensor:
    moments = problem.before[group]
    squared = -moments.block(moments.similarity("distance"), 0, network)
    return squared.clamp(min=0).sqrt()


def _weight_cost(problem: Problem, alignment: Alignment, group: str, network: int) -> Tensor:
    """Distance of the weights and biases that write the group, of those layers whose inputs are known already."""
    trace = problem.sources[0].trace
    known = {name for name, own in trace.spec.groups.items() if own.fixed} | set(alignment.groups)
    k, squared = problem.shared[group], torch.zeros(())
    for node in trace.graph.nodes:
        if not node.linear or [s.group for s in trace.layouts[node.name].segments] != [group]:
            continue
        inputs = trace.layouts[node.inputs[0]]
        if {s.group for s in inputs.segments} <= known:
            rows = []
            for m in (0, network):
                state = problem.sources[m].state
                weight = oriented(node, state[node.parameters["weight"]]).detach().double()[:k]
                columns = [
                    alignment.read(weight, inputs, problem.shared, m)[:, _shared(inputs, problem.shared)]
                ]
                if "bias" in node.parameters:
                    columns.append(state[node.parameters["bias"]].detach().double()[:k, None])
                rows.append(torch.cat([own.flatten(1) for own in columns], 1))
            squared = squared + torch.cdist(*rows).square().cpu()
    return squared.sqrt().expand(k, k)


def _shared(layout, shared) -> Tensor:
    """Entries of a value that hold shared units: those of separate ones have no counterpart."""
    index, start = [], 0
    for segment in layout.segments:
        index.append(start + torch.arange(shared.get(segment.group, segment.size) * segment.block))
        start += segment.size * segment.block
    return torch.cat(index)


def transport(cost: np.ndarray, regularisation: float = 0.0) -> np.ndarray:
    """The plan of least cost (k, k) between k and k units that weigh 1/k each: rows and columns add up to that."""
    from scipy.optimize import linear_sum_assignment  # here: slow to import

    if regularisation > 0:
        return _sinkhorn(cost / max(cost.max(), 1e-300), regularisation)
    plan = np.zeros_like(cost)
    plan[linear_sum_assignment(cost)] = 1 / len(cost)
    return plan


def _sinkhorn(
    cost: np.ndarray, regularisation: float, steps: int = 5000, tolerance: float = 1e-9
) -> np.ndarray:
    """Sinkhorn's iteration on logarithms, then rounded to the exact marginals (Altschuler et al. 2017, algorithm 2)."""
    from scipy.special import logsumexp  # here: slow to import

    k = len(cost)
    K, u, v = -cost / regularisation, np.zeros(k), np.zeros(k)
    for _ in range(steps):
        u = -np.log(k) - logsumexp(K + v, axis=1)
        v = -np.log(k) - logsumexp(K + u[:, None], axis=0)
        if np.abs(np.exp(u + logsumexp(K + v, axis=1)) * k - 1).max() < tolerance:
            break
    plan = np.exp(K + u[:, None] + v)
    plan *= np.minimum(1 / k / plan.sum(1), 1)[:, None]
    plan *= np.minimum(1 / k / plan.sum(0), 1)
    missing = np.maximum(1 / k - plan.sum(1), 0), np.maximum(1 / k - plan.sum(0), 0)
    if missing[0].sum() > 0:
        plan += np.outer(*missing) / missing[0].sum()
    return plan
