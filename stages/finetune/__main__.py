"""Finetune the source networks of the active profile: models/artifacts -> models/finetune."""

from pathlib import Path

import torch

from stages.core.runtime.command import command
from stages.core.runtime.device import prepare
from stages.core.runtime.files import write_tensors, write_text
from stages.core.settings.params import load_params
from stages.finetune.train import COLUMNS
from stages.finetune.workers import Job, Trained, run_all


def main() -> None:
    params = load_params()
    device = prepare(params.device, params.threads)
    jobs = [
        Job(
            name=name,
            architecture=params.active.architecture_of(name),
            task=task,
            settings=params.active.finetune,
            seeds=(params.seed, position),
            artifacts=(Path("data/artifacts"), Path("models/artifacts")),
            device=str(device),
            mixed_precision=params.finetune.mixed_precision_on(device.type),
        )
        for position, (name, task) in enumerate(params.active.tasks.items())
    ]
    for trained in run_all(jobs, params.finetune.workers):
        write(trained)


def write(trained: Trained) -> None:
    """The network, and its rows as CSV: only the header where there was nothing to train."""
    tensors = {name: torch.from_numpy(array) for name, array in trained.state.items()}
    write_tensors(f"models/finetune/{trained.name}.safetensors", tensors)
    lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in trained.rows)]
    write_text(f"reports/finetune/{trained.name}.csv", "\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
