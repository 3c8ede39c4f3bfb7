"""Finetune the source networks of the active profile: models/artifacts -> models/finetune."""

from contextlib import closing
from itertools import zip_longest
from typing import Any

import torch

from stages.core.graph.source import Task
from stages.core.handover.networks import description, save_network
from stages.core.images.load import load_images
from stages.core.networks.checkpoints import load_network
from stages.core.runtime.command import command
from stages.core.runtime.device import prepare
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_text
from stages.core.settings.params import Params, load_params
from stages.core.settings.places import DATA, MODELS, file_name
from stages.core.settings.profiles import Profile
from stages.core.tracing.known import read_known
from stages.core.tracing.sources import make_sources
from stages.finetune.train import COLUMNS
from stages.finetune.workers import Job, Trained, run_all


def main() -> None:
    params = load_params()
    device = prepare(params.device, params.threads)
    about = given(params)  # first, so that what cannot be merged is not trained
    jobs = [
        Job(
            name=name,
            architecture=params.active.architecture_of(name),
            task=task,
            settings=params.active.finetune,
            seeds=(params.seed, position),
            artifacts=(DATA, MODELS),
            device=str(device),
            mixed_precision=params.finetune.mixed_precision_on(device.type),
        )
        for position, (name, task) in enumerate(params.active.tasks.items())
    ]
    with closing(
        run_all(jobs, params.finetune.workers)
    ) as networks:  # ends its processes, whatever happens here
        for trained in networks:
            write(trained, about[trained.name], params)


def given(params: Params) -> dict[str, dict[str, Any]]:
    """What is to be known of each network as it comes: traced, verified and compared, with the names of its classes."""
    profile, classes = params.active, classes_of(params.active)
    networks, tasks = [], []
    for name, task in profile.tasks.items():
        networks.append(load_network(profile.architecture_of(name), MODELS / file_name(task.checkpoint)))
        tasks.append(Task(name, classes[name]))
    first = next(iter(profile.tasks.values())).data
    example = torch.zeros(2, first.channels, first.size, first.size)
    return {s.task.name: description(s) for s in make_sources(networks, tasks, example, profile.labels)}


def classes_of(profile: Profile) -> dict[str, tuple[str, ...]]:
    """The class names of each task's data. Raises InputError where a shared label space differs in a name or place."""
    found = {
        name: load_images(task.data, "calibration", DATA, limit=1).classes
        for name, task in profile.tasks.items()
    }
    first = next(iter(found))
    for name, classes in found.items() if profile.labels == "shared" else ():
        if classes != found[first]:
            one, other = next((a, b) for a, b in zip_longest(found[first], classes) if a != b)
            raise InputError(
                f"task {name}: its class {other!r} is {one!r} in task {first}; allowed with labels: shared: the same "
                "names in the same order; data.classes sets them"
            )
    return found


def write(trained: Trained, about: dict[str, Any], params: Params) -> None:
    """The network, and its rows as CSV: only the header where there was nothing to train."""
    tensors = {name: torch.from_numpy(array) for name, array in trained.state.items()}
    read = {name for node in about["graph"] for name in node["parameters"].values()}
    if read - tensors.keys():  # what is computed from tensors that were trained
        task = params.active.tasks[trained.name]
        network = load_network(
            params.active.architecture_of(trained.name), MODELS / file_name(task.checkpoint)
        )
        network.load_state_dict(tensors)
        tensors = read_known(network, torch.zeros(about["example"])).state(network)
    save_network(trained.name, tensors, about)
    lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in trained.rows)]
    write_text(f"reports/finetune/{trained.name}.csv", "\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
