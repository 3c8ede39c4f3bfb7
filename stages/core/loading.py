"""The active profile's networks and calibration images, as the stages between finetune and probe need them."""

from pathlib import Path

import torch

from stages.core.artifacts import sha256
from stages.core.checkpoints import load_network
from stages.core.datasets import load_images, normalise
from stages.core.network import Source, Task
from stages.core.params import Params
from stages.core.sources import make_sources
from stages.core.sweep import Batch, images_to_batches

DATA = Path("data/artifacts")
NETWORKS = Path("models/finetune")


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


def load_calibration(params: Params, images: int, batch_size: int, device: torch.device) -> list[Batch]:
    """Preprocessed calibration images of every task, at most ``images`` of each, without labels."""
    whole = []
    for task in params.active.tasks.values():
        found = load_images(task.data, "calibration", DATA, limit=images)
        whole.append(normalise(found.images.to(device), task.data.mean, task.data.std))
    return images_to_batches(whole, batch_size)
