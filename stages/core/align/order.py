"""Sources with their units in the order of a matching and its splits."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from stages.core.graph.source import Source
from stages.core.units.groups import permute
from stages.core.units.matching import Matching, UnitSplit, check_matching, check_splits, unit_order


def align(sources: Sequence[Source], matching: Matching, splits: Mapping[str, UnitSplit]) -> list[Source]:
    """The same functions with their units in merged order: matched pairs side by side, shared ones first."""
    check_matching(matching, sources[0].trace.spec, len(sources))
    check_splits(splits, sources[0].trace.spec)
    return [
        Source(
            s.trace,
            permute(s.state, s.trace.spec, unit_order(matching, splits, m, s.trace.spec)),
            s.task,
            s.about,
        )
        for m, s in enumerate(sources)
    ]


def merged_units(matching: Matching, splits: Mapping[str, UnitSplit]) -> dict[str, Tensor]:
    """{group: int64 (N, d)}: each source's own units in merged order, as a merged network records them."""
    return {
        name: matching.units[name][:, list(split.shared) + list(split.separate)]
        for name, split in splits.items()
    }
