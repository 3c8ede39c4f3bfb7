"""Gather the joint moments of the sources' features: models/finetune -> models/statistics."""

import torch

from stages.core.handover.calibration import load_calibration
from stages.core.handover.networks import load_sources
from stages.core.handover.statistics import MOMENTS
from stages.core.runtime import ranks
from stages.core.runtime.command import command
from stages.core.runtime.device import generator, prepare
from stages.core.runtime.files import write_tensors
from stages.core.runtime.spread import spread
from stages.core.settings.params import load_params, section_of
from stages.core.settings.sections import StatisticsSection
from stages.core.units.moments import to_tensors
from stages.statistics.moments import gather


def main() -> None:
    params = load_params()
    spread(params.ranks)
    section, profile = section_of(params, "statistics", StatisticsSection), params.active
    device = prepare(params.device, params.threads)
    batches = load_calibration(params, section.images, section.batch_size, device)
    if profile.proxy is not None:  # counted as one more task, so that its moments stay apart
        proxy = load_calibration(params, section.images, section.batch_size, device, "proxy")
        batches += [batch.of_task(len(profile.tasks)) for batch in proxy]
    gathered = gather(
        load_sources(params, device),
        batches,
        positions=section.positions,
        precision=getattr(torch, section.precision),
        storage=section.storage,
        memory=section.memory,
        generator=generator(params.seed, *([rank] if (rank := ranks.rank()) else [])),
        progress="statistics",
    )
    if ranks.rank() == 0:
        write_tensors(MOMENTS, to_tensors(gathered))


if __name__ == "__main__":
    command(main)
