"""A matching by any of the known ways, with what the later stages and the report need to know about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.network import Source
from stages.core.params import Matching as Settings
from stages.core.spec import Matching, identity_matching
from stages.match.assign import assign_jointly
from stages.match.benefit import unit_benefits
from stages.match.similarity import similarity
from stages.match.weights import match_weights


@dataclass(frozen=True)
class Pooled:
    """Moments over the images of all tasks, which weigh alike: {group: (N d,)} and {group: (N d, N d)}."""

    mean: Mapping[str, Tensor]
    second: Mapping[str, Tensor]


def make_matching(
    sources: Sequence[Source], settings: Settings, pooled: Pooled, generator: torch.Generator
) -> tuple[Matching, dict[str, Tensor]]:
    """Match the units of all free groups.

    Returns the matching, whose similarity is the correlation of each unit with the reference's whatever the way,
    and the benefit of separating each tuple, {group: (d,)}.
    """
    spec, networks = sources[0].trace.spec, len(sources)
    if settings.by == "identity":
        units = dict(identity_matching(spec, networks).units)
    elif settings.by == "weights":
        units = _by_weights(sources, settings, generator)
    else:
        units = {
            name: assign_jointly(
                similarity(pooled.mean[name], pooled.second[name], networks, settings.similarity),
                settings.sweeps,
            )
            for name in spec.free
        }
    matching = Matching(units, correlations(units, pooled))
    return matching, unit_benefits(sources, matching, pooled.mean, pooled.second)


def correlations(units: Mapping[str, Tensor], pooled: Pooled) -> dict[str, Tensor]:
    """Correlation of each unit with the reference's unit it is matched to: {group: float64 (N, d)}."""
    found = {}
    for name, own in units.items():
        networks, d = own.shape
        S = similarity(pooled.mean[name], pooled.second[name], networks, "correlation").cpu()
        found[name] = torch.stack([S[0, m][torch.arange(d), own[m]] for m in range(networks)])
    return found


def _by_weights(
    sources: Sequence[Source], settings: Settings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The best of several random orders. Heads of different label spaces have nothing in common, and do not count."""
    spec, head = sources[0].trace.spec, set[str]()
    if len({source.task.classes for source in sources}) > 1:
        head = set(sources[0].graph.output.parameters.values())
    states = [{name: t for name, t in source.state.items() if name not in head} for source in sources]
    runs = [match_weights(spec, states, generator, settings.sweeps) for _ in range(settings.restarts)]
    return max(runs, key=lambda run: run[1][-1])[0]
