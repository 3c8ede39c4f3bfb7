"""What a way of matching has to go by: every file of stages/match/ways is given this."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph.source import Source
from stages.core.recipe.methods import MatchSettings
from stages.core.units.groups import PermutationSpec
from stages.core.units.moments import Statistics


@dataclass(frozen=True)
class Given:
    """The networks as they were traced, a row of `match`, the moments of their units, and what draws at random."""

    sources: Sequence[Source]
    settings: MatchSettings
    statistics: Statistics
    generator: torch.Generator

    @property
    def spec(self) -> PermutationSpec:
        return self.sources[0].trace.spec

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """The sources' weights. Heads of different label spaces have nothing in common, and do not count."""
        head = set[str]()
        if len({source.task.classes for source in self.sources}) > 1:
            graph = self.sources[0].graph
            head = {name for n in graph.nodes if n.name in graph.logits for name in n.parameters.values()}
        return [{name: t for name, t in source.state.items() if name not in head} for source in self.sources]
