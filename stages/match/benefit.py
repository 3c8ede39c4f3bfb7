"""What keeping a matched tuple of units separate is worth, measured from the statistics.

A shared unit can be only one function where the sources have N. What that costs is the part of the sources' units
that a common function does not explain, weighted by how much the layers that read the group depend on the unit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.graph.nodes import oriented
from stages.core.graph.source import Source
from stages.core.graph.trace import Trace
from stages.core.units.matching import Matching
from stages.core.units.moments import Statistics


def unit_benefits(sources: Sequence[Source], matching: Matching, statistics: Statistics) -> dict[str, Tensor]:
    """Benefit of separating unit j of every free group: {group: float64 (d,)}, non-negative.

    For network m, the unexplained share of a
    tuple is 1 - (its mean correlation with the others), and its weight the share of each reading layer's input
    variance that comes through the unit, summed over layers and averaged over networks.
    """
    trace = sources[0].trace
    benefits = {}
    for name in trace.spec.free:
        units = matching.units[name]
        networks, d = units.shape
        correlation = statistics.matched(trace.spec, matching.units, name)
        unexplained = torch.zeros(d, dtype=torch.float64)
        for m in range(networks):
            for n in range(m):
                unexplained += 1 - correlation[m, n]
        unexplained /= networks * (networks - 1) / 2
        variance = statistics.after[name].covariance.diagonal().clamp(min=0).view(networks, d)
        weight = torch.zeros(d, dtype=torch.float64)
        for m, source in enumerate(sources):
            weight += reading_share(trace, source, name, variance[m])[units[m]] / networks
        benefits[name] = (unexplained * weight).clamp(min=0)
    return benefits


def reading_share(trace: Trace, source: Source, group: str, variance: Tensor) -> Tensor:
    """Per unit, the share of the input variance of each layer that reads the group, summed over layers: (d,)."""
    d = len(variance)
    total = torch.zeros(d, dtype=torch.float64)
    for node in trace.graph.nodes:
        if not node.linear:
            continue
        places = trace.layouts[node.inputs[0]].places(group, d)
        if not places:
            continue
        weight = oriented(node, source.state[node.parameters["weight"]]).detach().cpu().double()
        for index in places:
            own = weight[:, index]
            energy = own.square().flatten(2).sum((0, 2)) if weight.dim() > 2 else own.square().sum(0)
            share = energy.view(d, -1).sum(1) * variance
            total += share / share.sum().clamp(min=1e-300)
    return total
