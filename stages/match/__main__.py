"""Pair the units of the sources in every way that a method uses: models/statistics -> models/match/<name>."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from stages.core.handover.networks import load_sources
from stages.core.handover.pairing import save_matching
from stages.core.handover.statistics import load_statistics
from stages.core.recipe.recipe import load_recipe
from stages.core.recipe.rooms import check_match
from stages.core.runtime.command import command
from stages.core.runtime.device import generator, prepare
from stages.core.runtime.files import write_csv, write_json
from stages.core.runtime.progress import Bar
from stages.core.settings.params import load_params
from stages.core.units.groups import PermutationSpec
from stages.core.units.matching import Matching, identity_matching
from stages.core.units.moments import Statistics
from stages.match.matching import correlations, make_matching


def main() -> None:
    params = load_params()
    prepare("cpu", params.threads)
    matchings = load_recipe(params).matchings
    for name, settings in matchings.items():
        check_match(settings, f"match.{name}")
    sources = load_sources(params, torch.device("cpu"))
    for name, settings in Bar(matchings.items(), desc="match", unit="matching"):
        statistics, start = load_statistics(params, settings.data), time.perf_counter()
        matching, benefits = make_matching(sources, settings, statistics, generator(params.seed))
        seconds = time.perf_counter() - start
        save_matching(name, matching, benefits)
        write_csv(f"reports/match/{name}.csv", list(rows(sources[0].trace.spec, matching, statistics)))
        write_json(f"reports/match/{name}.seconds.json", {"seconds": round(seconds, 3)})


def rows(spec: PermutationSpec, matching: Matching, statistics: Statistics) -> Iterator[dict[str, Any]]:
    """Mean correlation of the pairs of each group and network, and what pairing by position gives."""
    networks = len(next(iter(matching.units.values())))
    unmatched = correlations(spec, identity_matching(spec, networks).units, statistics)
    for group, own in matching.similarity.items():
        for m in range(1, len(own)):
            values = {"similarity": own[m], "unmatched": unmatched[group][m]}
            numbers = {key: round(float(value.mean()), 6) for key, value in values.items()}
            yield {"group": group, "network": m, "units": len(own[m]), **numbers}


if __name__ == "__main__":
    command(main)
