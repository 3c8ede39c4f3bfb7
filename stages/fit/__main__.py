"""Build one method's merged network: models/match, models/allocate -> models/fit/<method>."""

import time
from functools import partial

import torch

from stages.core.align.solve import make_alignment
from stages.core.handover.calibration import load_calibration, load_pools
from stages.core.handover.networks import load_sources
from stages.core.handover.pairing import load_pairing
from stages.core.handover.statistics import load_statistics
from stages.core.recipe.recipe import Recipe, load_recipe
from stages.core.recipe.rooms import check_fit
from stages.core.runtime import ranks
from stages.core.runtime.command import command
from stages.core.runtime.device import generator, prepare
from stages.core.runtime.files import write_csv, write_json, write_text
from stages.core.runtime.spread import spread
from stages.core.settings.params import Params, load_params
from stages.fit.network import fit_network


def main(name: str) -> None:
    params = load_params()
    spread(params.ranks)
    recipe = load_recipe(params)
    section, method, settings = recipe.fit, recipe.method(name), recipe.matching_of(name)
    check_fit(method.fit, method.data, f"methods.{name}.fit")
    device = prepare(params.device, params.threads)
    matching, splits, reached, dense = load_pairing(method.match)
    sources = load_sources(params, device)
    batches = load_calibration(params, section.images, section.batch_size, device, method.data)
    refining, training = method.fit.refine, params.active.finetune
    start = time.perf_counter()
    network, record = fit_network(
        sources,
        matching,
        splits,
        batches,
        method.fit,
        labels=params.active.labels,
        dense=dense,
        alignment=make_alignment(
            settings, sources, partial(load_statistics, params, settings.data), matching, splits
        ),
        ridge=section.ridge,
        positions=section.positions,
        precision=getattr(torch, section.precision),
        storage=section.storage,
        memory=section.memory,
        generator=generator(params.seed),
        about=description(params, recipe, name, reached),
        unlabelled=refining and load_pools(params, refining.images, refining.most, device, method.data),
        shift=training.shift,
        flip=training.flip,
        progress=f"fit {name}",
    )
    if ranks.rank():
        return
    seconds = time.perf_counter() - start
    write_json(f"reports/fit/{name}.seconds.json", {"seconds": round(seconds, 3)})
    write_json(f"reports/fit/{name}.refined.json", network.about.get("refined"))
    network.save(f"models/fit/{name}.safetensors")
    if record:
        write_csv(
            f"reports/fit/{name}.csv",
            [
                {
                    "layer": line.layer,
                    "residual": f"{line.residual:.6g}",
                    "ridge": "" if line.ridge is None else f"{line.ridge:.3g}",
                }
                for line in record
            ],
        )
    else:  # averaging fits nothing
        write_text(f"reports/fit/{name}.csv", "layer,residual,ridge\n")


def description(params: Params, recipe: Recipe, name: str, reached: float) -> dict:
    """What a merged file says about itself."""
    data = {task: own.data for task, own in params.active.tasks.items()}
    return {
        "profile": params.profile,
        "architecture": params.active.architecture.model_dump(),
        "preprocessing": {
            task: {"size": d.size, "channels": d.channels, "mean": d.mean, "std": d.std}
            for task, d in data.items()
        },
        "method": {
            "name": name,
            **recipe.method(name).model_dump(),
            "matching": recipe.matching_of(name).model_dump(),
            "settings": recipe.fit.model_dump(exclude={"storage"}),  # where values were kept changes nothing
        },
        "budget": {"asked": params.budget, "reached": reached, "counted": recipe.allocate.cost},
        "seed": params.seed,
    }


if __name__ == "__main__":
    command(main, "method")
