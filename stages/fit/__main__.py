"""Merge the sources by one method of params.yaml: models/match, models/allocate -> models/fit/<method>."""

import torch

from stages.core.artifacts import read_json, read_tensors, write_csv, write_text
from stages.core.command import command
from stages.core.device import generator, prepare
from stages.core.loading import load_calibration, load_sources
from stages.core.params import Params, load_params
from stages.core.spec import Matching, UnitSplit
from stages.fit.merge import fit_network


def main(name: str) -> None:
    params = load_params()
    method, section = params.method(name), params.fit
    device = prepare(params.device, params.threads)
    matching, splits, reached = read_alignment(method.match)
    network, record = fit_network(
        load_sources(params, device),
        matching,
        splits,
        load_calibration(params, section.images, section.batch_size, device),
        method.fit,
        labels=params.active.labels,
        ridge=section.ridge,
        positions=section.positions,
        storage=getattr(torch, section.storage),
        memory=section.memory,
        generator=generator(params.seed),
        about=description(params, name, reached),
        progress=f"fit {name}",
    )
    network.save(f"models/fit/{name}.safetensors")
    if record:
        write_csv(
            f"reports/fit/{name}.csv",
            [{"layer": line.layer, "residual": f"{line.residual:.6g}"} for line in record],
        )
    else:  # averaging fits nothing
        write_text(f"reports/fit/{name}.csv", "layer,residual\n")


def read_alignment(name: str) -> tuple[Matching, dict[str, UnitSplit], float]:
    """What match and allocate left: the matching, the splits, and the budget reached."""
    tensors, _ = read_tensors(f"models/match/{name}.safetensors")
    allocation = read_json(f"models/allocate/{name}.json")
    splits = {
        group: UnitSplit(tuple(split["shared"]), tuple(split["separate"]))
        for group, split in allocation["splits"].items()
    }
    units, similarity = ({g: tensors[f"{kind}/{g}"] for g in splits} for kind in ("units", "similarity"))
    return Matching(units, similarity), splits, allocation["reached"]


def description(params: Params, name: str, reached: float) -> dict:
    """What a merged file says about itself."""
    data = {task: own.data for task, own in params.active.tasks.items()}
    return {
        "profile": params.profile,
        "architecture": params.active.architecture.model_dump(),
        "preprocessing": {
            task: {"size": d.size, "channels": d.channels, "mean": d.mean, "std": d.std}
            for task, d in data.items()
        },
        "method": {"name": name, **params.method(name).model_dump(), "settings": params.fit.model_dump()},
        "budget": {"asked": params.budget, "reached": reached, "counted": params.allocate.cost},
        "seed": params.seed,
    }


if __name__ == "__main__":
    command(main, "method")
