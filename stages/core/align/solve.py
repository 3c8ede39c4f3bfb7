"""Alignments by name: the matchings that go beyond a permutation, a file of stages/core/align/ways each."""

from collections.abc import Callable, Mapping, Sequence

from stages.core.align.alignment import Alignment
from stages.core.align.order import align, merged_units
from stages.core.align.problem import Problem, make_problem
from stages.core.graph.source import Source
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS
from stages.core.units.matching import Matching, UnitSplit
from stages.core.units.moments import Statistics


def make_alignment(
    settings: MatchSettings,
    sources: Sequence[Source],
    statistics: Callable[[], Statistics],
    matching: Matching,
    splits: Mapping[str, UnitSplit],
) -> Alignment:
    """What is done to the shared units beyond pairing them; nothing where the way is a permutation.

    sources: as they were traced. statistics: asked for where they are needed, since they may be large. Of the units
    that stay separate, nothing is used.
    """
    if settings.by not in ALIGNMENTS.names:
        return Alignment(len(sources))
    problem = problem_of(sources, statistics(), matching, splits)
    return ALIGNMENTS.way(settings.by).make(problem, settings)


def problem_of(
    sources: Sequence[Source], statistics: Statistics, matching: Matching, splits: Mapping[str, UnitSplit]
) -> Problem:
    """Of the units that are shared. sources: as they were traced."""
    aligned, units = align(sources, matching, splits), merged_units(matching, splits)
    shared = {name: len(split.shared) for name, split in splits.items()}
    return make_problem(aligned, statistics, units, shared)
