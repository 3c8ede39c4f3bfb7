"""Mend the statistics of every method's network, and write its card: models/fit -> models/recalibrate."""

from collections.abc import Sequence
from functools import cache, partial

import torch

from stages.core.align.alignment import Alignment
from stages.core.align.order import align
from stages.core.align.solve import make_alignment
from stages.core.graph.source import Source
from stages.core.handover.calibration import load_calibration
from stages.core.handover.networks import load_sources
from stages.core.handover.pairing import load_pairing
from stages.core.handover.statistics import load_statistics
from stages.core.merged.card import card
from stages.core.merged.file import load_merged
from stages.core.recipe.recipe import Recipe, load_recipe
from stages.core.recipe.rooms import check_recalibration
from stages.core.runtime import ranks
from stages.core.runtime.command import command
from stages.core.runtime.device import prepare
from stages.core.runtime.errors import InputError, some
from stages.core.runtime.files import write_text
from stages.core.runtime.spread import spread
from stages.core.settings.params import Params, load_params
from stages.recalibrate.recalibrate import recalibrate


def main() -> None:
    params = load_params()
    spread(params.ranks)
    recipe = load_recipe(params)
    device, section = prepare(params.device, params.threads), recipe.recalibrate
    batches = cache(lambda data: load_calibration(params, section.images, section.batch_size, device, data))
    sources = cache(lambda: load_sources(params, device))
    for name, method in recipe.methods.items():
        way = check_recalibration(method.recalibrate, method.data, f"methods.{name}.recalibrate")
        network = load_merged(f"models/fit/{name}.safetensors", device)
        tasks = [task.name for task in network.tasks]
        if tasks != list(params.active.tasks):
            raise InputError(
                f"models/fit/{name}.safetensors: found tasks {some(tasks)}; allowed: {some(params.active.tasks)}, the "
                "active profile's; run: dvc repro"
            )
        aligned = aligned_sources(params, recipe, method.match, sources()) if way.aligned else ((), None)
        recalibrate(
            network,
            method.recalibrate,
            batches(method.data),
            *aligned,
            precision=getattr(torch, section.precision),
            storage=section.storage,
            memory=section.memory,
            progress=f"recalibrate {name}",
        )
        if ranks.rank() == 0:
            path = f"models/recalibrate/{name}.safetensors"
            network.save(path)
            write_text(f"models/recalibrate/{name}.md", card(network, path))


def aligned_sources(
    params: Params, recipe: Recipe, match: str, sources: Sequence[Source]
) -> tuple[list[Source], Alignment]:
    """The sources in the merged order of a named matching, and its alignment."""
    matching, splits, *_ = load_pairing(match)
    settings = recipe.match[match]
    statistics = partial(load_statistics, params, settings.data)
    alignment = make_alignment(settings, sources, statistics, matching, splits)
    return align(sources, matching, splits), alignment


if __name__ == "__main__":
    command(main)
