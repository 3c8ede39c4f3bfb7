"""Choose what stays separate at the budget, for every matching: models/match -> models/allocate."""

from dataclasses import asdict

import torch

from stages.allocate.splits import split_units
from stages.core.handover.networks import load_sources
from stages.core.handover.pairing import load_benefits
from stages.core.merged.cost import relative
from stages.core.recipe.recipe import load_recipe
from stages.core.runtime.command import command
from stages.core.runtime.device import prepare
from stages.core.runtime.files import write_csv, write_json
from stages.core.settings.params import load_params


def main() -> None:
    params = load_params()
    prepare("cpu", params.threads)
    recipe = load_recipe(params)
    sources = load_sources(params, torch.device("cpu"))
    for name, matching in recipe.matchings.items():
        benefits = load_benefits(name, sources[0].trace.spec.free)
        settings = recipe.allocate.spent(matching.allocate)
        splits, found, base = split_units(
            sources[0], benefits, params.budget, len(sources), params.active.labels, settings
        )
        about = {
            "budget": params.budget,
            "by": settings.by,
            "dense": settings.dense,
            "counted": settings.cost,
            "cost": found.cost,
            "source": base,
        }
        gap = {"benefit": found.benefit, "bound": found.bound}
        groups = {group: asdict(split) for group, split in splits.items()}
        write_json(
            f"models/allocate/{name}.json",
            {**about, "reached": relative(found.cost, base), **gap, "splits": groups},
        )
        rows = [
            {
                "group": group,
                "units": split.size,
                "shared": len(split.shared),
                "separate": len(split.separate),
                "fraction": round(split.fraction, 6),
            }
            for group, split in splits.items()
        ]
        write_csv(f"reports/allocate/{name}.csv", rows)


if __name__ == "__main__":
    command(main)
