"""The active profile's networks, images and statistics, as the stages between finetune and probe need them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stages.core.images.load import load_images, normalise
from stages.core.merged.network import Source, Task
from stages.core.networks.checkpoints import load_network
from stages.core.runtime.files import read_json, read_tensors, sha256, write_tensors
from stages.core.settings.params import Params
from stages.core.sweep.sweep import NO_TASK, Batch, images_to_batches
from stages.core.tracing.sources import make_sources
from stages.core.units.groups import Matching, UnitSplit
from stages.core.units.moments import Data, Statistics, from_tensors, pool

DATA = Path("data/artifacts")
NETWORKS = Path("models/finetune")
MOMENTS = Path("models/statistics/moments.safetensors")


def network_path(task: str) -> Path:
    """Where the finetune stage leaves a task's network."""
    return NETWORKS / f"{task}.safetensors"


def load_sources(params: Params, device: torch.device) -> list[Source]:
    """The finetuned networks, traced and verified, each with the hash of its file."""
    profile = params.active
    networks, tasks = [], []
    for name, task in profile.tasks.items():
        networks.append(load_network(profile.architecture_of(name), network_path(name)).to(device))
        tasks.append(Task(name, load_images(task.data, "calibration", DATA, limit=1).classes))
    first = next(iter(profile.tasks.values())).data
    example = torch.zeros(2, first.channels, first.size, first.size, device=device)
    sources = make_sources(networks, tasks, example, profile.labels)
    return [Source(s.trace, s.state, s.task, {"sha256": sha256(network_path(s.task.name))}) for s in sources]


def load_calibration(
    params: Params, images: int, batch_size: int, device: torch.device, data: Data = "own"
) -> list[Batch]:
    """Preprocessed calibration images without labels: at most ``images`` of every task, or as many of the proxy."""
    profile = params.active
    if data == "proxy":
        wanted, images = [profile.proxy], images * len(profile.tasks)
    else:
        wanted = [task.data for task in profile.tasks.values()]
    whole = []
    for own in wanted:
        found = load_images(own, "calibration", DATA, limit=images)
        whole.append(normalise(found.images.to(device), own.mean, own.std))
    batches = images_to_batches(whole, batch_size)
    return [Batch(batch.images, NO_TASK) for batch in batches] if data == "proxy" else batches


def load_statistics(params: Params, data: Data) -> Statistics:
    """What the statistics stage found, pooled over the tasks' own images or over the proxy's."""
    tasks = len(params.active.tasks)
    return pool(from_tensors(read_tensors(MOMENTS)[0]), tasks, tasks, data)


def save_matching(name: str, matching: Matching, benefits: Mapping[str, Tensor]) -> None:
    """Leave a matching, with its orders inside parts, and what separating each tuple is worth under its name."""
    found = {"units": matching.units, "similarity": matching.similarity, "benefit": benefits}
    write_tensors(
        f"models/match/{name}.safetensors",
        {f"{kind}/{group}": tensor for kind, own in found.items() for group, tensor in own.items()},
    )


def load_pairing(name: str) -> tuple[Matching, dict[str, UnitSplit], float]:
    """What match and allocate left under a matching's name: the pairs, the splits, and the budget reached."""
    tensors, _ = read_tensors(f"models/match/{name}.safetensors")
    allocation = read_json(f"models/allocate/{name}.json")
    splits = {
        group: UnitSplit(tuple(split["shared"]), tuple(split["separate"]))
        for group, split in allocation["splits"].items()
    }
    units, similarity = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("units/", "similarity/")
    )
    return Matching(units, similarity), splits, allocation["reached"]
