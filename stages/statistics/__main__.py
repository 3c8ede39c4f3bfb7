"""Gather the joint moments of the sources' features: models/finetune -> models/statistics."""

import torch

from stages.core.artifacts import write_tensors
from stages.core.command import command
from stages.core.device import generator, prepare
from stages.core.loading import load_calibration, load_sources
from stages.core.params import load_params
from stages.statistics.moments import gather


def main() -> None:
    params = load_params()
    device, section = prepare(params.device, params.threads), params.statistics
    moments = gather(
        load_sources(params, device),
        load_calibration(params, section.images, section.batch_size, device),
        positions=section.positions,
        storage=getattr(torch, section.storage),
        memory=section.memory,
        generator=generator(params.seed),
        progress="statistics",
    )
    tensors = {f"{group}/mean": m.mean for group, m in moments.items()}
    tensors |= {f"{group}/second": m.second for group, m in moments.items()}
    write_tensors("models/statistics/moments.safetensors", tensors)


if __name__ == "__main__":
    command(main)
