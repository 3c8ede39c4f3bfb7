"""A matching by any of the known ways, with what the later stages and the report need to know about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.align.solve import ALIGNMENTS, make_alignment
from stages.core.graph.source import Source
from stages.core.recipe.methods import MatchSettings
from stages.core.units.groups import PermutationSpec
from stages.core.units.matching import Matching, full_split, identity_matching
from stages.core.units.moments import Statistics
from stages.match.assign import assign, assign_parts_jointly
from stages.match.benefit import unit_benefits
from stages.match.dual import match_dual
from stages.match.weights import match_weights


@dataclass(frozen=True)
class Given:
    """What a way of matching has to go by."""

    sources: Sequence[Source]
    settings: MatchSettings
    statistics: Statistics
    generator: torch.Generator


def make_matching(
    sources: Sequence[Source], settings: MatchSettings, statistics: Statistics, generator: torch.Generator
) -> tuple[Matching, dict[str, Tensor]]:
    """Match the units of all free groups.

    Returns the matching, whose similarity is the correlation of each unit with the reference's whatever the way,
    and the benefit of separating each tuple, {group: (d,)}. Where units lie in parts, every way but those by position
    and by an alignment also puts the units inside matched parts in order.
    """
    units = WAYS.get(settings.by, _by_alignment)(Given(sources, settings, statistics, generator))
    matching = Matching(units, correlations(sources[0].trace.spec, units, statistics))
    return matching, unit_benefits(sources, matching, statistics)


def correlations(
    spec: PermutationSpec, units: Mapping[str, Tensor], statistics: Statistics
) -> dict[str, Tensor]:
    """Correlation of each unit with the reference's unit it is matched to: {group: float64 (N, d)}."""
    return {name: statistics.matched(spec, units, name)[0] for name in spec.free}


def _by_position(given: Given) -> dict[str, Tensor]:
    return dict(identity_matching(given.sources[0].trace.spec, len(given.sources)).units)


def _by_activations(given: Given) -> dict[str, Tensor]:
    """One assignment per group, with those inside parts by the units' own activations."""
    spec, units = given.sources[0].trace.spec, {}
    for name, group in spec.ordered.items():
        alike = given.statistics.between(spec, name, given.settings.similarity)
        parts, inside = assign_parts_jointly(alike, group.size, given.settings.sweeps, group.fixed)
        units |= spec.tables(name, parts, inside)
    return units


def _by_weights(given: Given) -> dict[str, Tensor]:
    """The best of several random orders."""
    spec, states = given.sources[0].trace.spec, _states(given.sources)
    runs = [
        match_weights(spec, states, given.generator, given.settings.sweeps)
        for _ in range(given.settings.restarts)
    ]
    return max(runs, key=lambda run: run[1][-1])[0]


def _by_both(given: Given) -> dict[str, Tensor]:
    spec, states = given.sources[0].trace.spec, _states(given.sources)
    alike = dict[str, Tensor]()
    for name in spec.ordered:
        alike |= given.statistics.between(spec, name, "correlation")
    return match_dual(spec, states, alike, given.settings.rho, given.generator, given.settings.sweeps)[0]


def _by_alignment(given: Given) -> dict[str, Tensor]:
    """The pairs that an alignment of all units ties most; what it leaves open is decided by correlation."""
    spec, networks = given.sources[0].trace.spec, len(given.sources)
    position = identity_matching(spec, networks)
    alignment = make_alignment(
        given.settings, given.sources, lambda: given.statistics, position, full_split(spec)
    )
    units = dict(position.units)
    for name, found in alignment.groups.items():
        alike = given.statistics.after[name].between("correlation")
        for m in range(1, networks):
            units[name][m] = assign(found.unmerges[0] @ found.views[m] + 1e-3 * alike[0, m])
    return units


def _states(sources: Sequence[Source]) -> list[dict[str, Tensor]]:
    """The sources' weights. Heads of different label spaces have nothing in common, and do not count."""
    head = set[str]()
    if len({source.task.classes for source in sources}) > 1:
        graph = sources[0].graph
        head = {name for n in graph.nodes if n.name in graph.logits for name in n.parameters.values()}
    return [{name: t for name, t in source.state.items() if name not in head} for source in sources]


WAYS: dict[str, Callable[[Given], dict[str, Tensor]]] = {
    "identity": _by_position,
    "weights": _by_weights,
    "activations": _by_activations,
    "dual": _by_both,
    **dict.fromkeys(ALIGNMENTS, _by_alignment),
}
