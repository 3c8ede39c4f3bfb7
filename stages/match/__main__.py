"""Pair the units of the sources in one of the ways of params.yaml: models/statistics -> models/match/<name>."""

from collections.abc import Iterator
from typing import Any

import torch

from stages.core.artifacts import read_tensors, write_csv, write_tensors
from stages.core.command import command
from stages.core.device import generator, prepare
from stages.core.loading import load_sources
from stages.core.params import load_params
from stages.core.spec import Matching
from stages.match.matching import Pooled, correlations, make_matching


def main(name: str) -> None:
    params = load_params()
    settings = params.matching(name)
    prepare("cpu", params.threads)
    sources = load_sources(params, torch.device("cpu"))
    tensors, _ = read_tensors("models/statistics/moments.safetensors")
    pooled = Pooled(
        *({g: tensors[f"{g}/{part}"].mean(0) for g in sources[0].trace.spec.free} for part in PARTS)
    )
    matching, benefits = make_matching(sources, settings, pooled, generator(params.seed))
    found = {"units": matching.units, "similarity": matching.similarity, "benefit": benefits}
    write_tensors(
        f"models/match/{name}.safetensors",
        {f"{kind}/{group}": tensor for kind, own in found.items() for group, tensor in own.items()},
    )
    write_csv(f"reports/match/{name}.csv", list(rows(matching, pooled)))


PARTS = ("mean", "second")


def rows(matching: Matching, pooled: Pooled) -> Iterator[dict[str, Any]]:
    """Mean correlation of the pairs of each group and network, and what pairing by position gives."""
    position = {g: torch.arange(units.shape[1]).repeat(len(units), 1) for g, units in matching.units.items()}
    unmatched = correlations(position, pooled)
    for group, own in matching.similarity.items():
        for m in range(1, len(own)):
            values = {"similarity": own[m], "unmatched": unmatched[group][m]}
            numbers = {key: round(float(value.mean()), 6) for key, value in values.items()}
            yield {"group": group, "network": m, "units": len(own[m]), **numbers}


if __name__ == "__main__":
    command(main, "matching")
