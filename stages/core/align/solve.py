"""Alignments by name: the ways of `match` in params.yaml that go beyond a permutation."""

from collections.abc import Callable, Mapping, Sequence

from stages.core.align.alignment import Alignment
from stages.core.align.cca import align_cca
from stages.core.align.order import align, merged_units
from stages.core.align.problem import Problem, make_problem
from stages.core.align.transport import align_transport
from stages.core.align.zipit import align_zip
from stages.core.graph.source import Source
from stages.core.recipe.methods import MatchSettings
from stages.core.units.matching import Matching, UnitSplit
from stages.core.units.moments import Statistics

ALIGNMENTS: dict[str, Callable[[Problem, MatchSettings], Alignment]] = {
    "zip": lambda problem, settings: align_zip(problem, settings.alpha, settings.beta),
    "cca": lambda problem, settings: align_cca(problem, settings.ridge),
    "transport": lambda problem, settings: align_transport(
        problem, settings.features, settings.regularisation
    ),
}


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
    if settings.by not in ALIGNMENTS:
        return Alignment(len(sources))
    aligned, units = align(sources, matching, splits), merged_units(matching, splits)
    shared = {name: len(split.shared) for name, split in splits.items()}
    return ALIGNMENTS[settings.by](make_problem(aligned, statistics(), units, shared), settings)
