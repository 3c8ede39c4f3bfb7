"""Alignments by name: the ways of `match` in params.yaml that go beyond a permutation."""

from collections.abc import Callable, Mapping, Sequence

from stages.core.alignment import Alignment
from stages.core.alignments.cca import align_cca
from stages.core.alignments.problem import Problem, make_problem
from stages.core.alignments.transport import align_transport
from stages.core.alignments.zipping import align_zip
from stages.core.methods import Matching as Settings
from stages.core.moments import Statistics
from stages.core.network import Source
from stages.core.sources import align, merged_units
from stages.core.spec import Matching, UnitSplit

ALIGNMENTS: dict[str, Callable[[Problem, Settings], Alignment]] = {
    "zip": lambda problem, settings: align_zip(problem, settings.alpha, settings.beta),
    "cca": lambda problem, settings: align_cca(problem, settings.ridge),
    "transport": lambda problem, settings: align_transport(
        problem, settings.features, settings.regularisation
    ),
}


def make_alignment(
    settings: Settings,
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
