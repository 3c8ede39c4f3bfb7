"""The rows of the result table as things that can be probed, with what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.core.graph.source import Source
from stages.core.merged.cost import built_cost, relative, source_cost
from stages.core.merged.file import load_merged
from stages.core.runtime.errors import InputError
from stages.probe.evaluate import Candidate, Ensemble, OneForAll, Oracle


@dataclass(frozen=True)
class Row:
    """One row: what is probed, its cost relative to one source, its budget, and one forward pass.

    tune: makes that as fast as it goes on some images, and says what multiply-accumulates are then executed.
    """

    candidate: Candidate
    cost: dict[str, float]
    budget: float
    forward: Callable[[Tensor], object]
    tune: Callable[[Tensor], float]


def merged_row(path: Path, sources: Sequence[Source], labels: str, device: torch.device) -> Row:
    """A merged network. Raises InputError when it was made from other networks than these."""
    network = load_merged(path, device)
    found = network.about.get("sources", {})
    for source in sources:
        if found.get(source.task.name) != source.about["sha256"]:
            raise InputError(f"{path}: made from another network for task {source.task.name}; run: dvc repro")
    cost = {
        kind: relative(
            built_cost(network, kind), source_cost(sources[0].trace, sources[0].state, labels, kind)
        )
        for kind in ("macs", "parameters")
    }
    told = network.tasks[0].name if network.corrected else None  # then one task at a time is how it runs
    one = source_cost(sources[0].trace, sources[0].state, labels, "macs")

    def tune(x: Tensor) -> float:
        network.tune(x)
        return relative(built_cost(network, "macs", executed=True), one)

    return Row(OneForAll(network), cost, network.about["budget"]["asked"], lambda x: network(x, told), tune)


def reference_row(name: str, sources: Sequence[Source], labels: str) -> Row:
    """ensemble: all sources at once. oracle: one of them, chosen by somebody who knows the task."""
    count = float(len(sources))
    if name == "oracle":
        cost = {"macs": 1.0, "parameters": count}
        return Row(Oracle(sources, labels), cost, count, sources[0], lambda x: 1.0)
    cost, both = {"macs": count, "parameters": count}, lambda x: [source(x) for source in sources]
    return Row(Ensemble(sources, labels), cost, count, both, lambda x: count)
