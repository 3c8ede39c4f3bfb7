"""A matching by any of the known ways, with what the later stages and the report need to know about it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.core.align.solve import problem_of
from stages.core.graph.source import Source
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS, MATCHINGS
from stages.core.units.groups import PermutationSpec
from stages.core.units.matching import Matching, full_split, identity_matching
from stages.core.units.moments import Statistics
from stages.match.assign import assign
from stages.match.benefit import unit_benefits
from stages.match.given import Given


def make_matching(
    sources: Sequence[Source], settings: MatchSettings, statistics: Statistics, generator: torch.Generator
) -> tuple[Matching, dict[str, Tensor]]:
    """Match the units of all free groups.

    Returns the matching, whose similarity is the correlation of each unit with the reference's whatever the way,
    and the benefit of separating each tuple, {group: (d,)}. Where units lie in parts, every way but those by position
    and by an alignment also puts the units inside matched parts in order.
    """
    given = Given(sources, settings, statistics, generator)
    if settings.by in ALIGNMENTS.names:
        units, benefits = _by_alignment(given)
    else:
        units, benefits = MATCHINGS.way(settings.by).make(given), None
    matching = Matching(units, correlations(given.spec, units, statistics))
    return matching, benefits or unit_benefits(sources, matching, statistics)


def correlations(
    spec: PermutationSpec, units: Mapping[str, Tensor], statistics: Statistics
) -> dict[str, Tensor]:
    """Correlation of each unit with the reference's unit it is matched to: {group: float64 (N, d)}."""
    return {name: statistics.matched(spec, units, name)[0] for name in spec.free}


def _by_alignment(given: Given) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The tuples that an alignment of all units says, and their worth; else the pairs that it ties most.

    What it leaves open is decided by correlation.
    """
    spec, networks = given.spec, len(given.sources)
    way, position = ALIGNMENTS.way(given.settings.by), identity_matching(spec, networks)
    problem = problem_of(given.sources, given.statistics, position, full_split(spec))
    if way.tuples is not None:
        return way.tuples(problem, given.settings)
    units = dict(position.units)
    for name, found in way.make(problem, given.settings).groups.items():
        alike = given.statistics.after[name].between("correlation")
        for m in range(1, networks):
            units[name][m] = assign(found.unmerges[0] @ found.views[m] + 1e-3 * alike[0, m])
    return units, None
