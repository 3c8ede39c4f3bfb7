"""Accuracy, linear probes, cost and latency of the named rows, or of all: models/recalibrate -> reports/probe.

The rows `oracle` and `ensemble` need no merged network. This is the only stage that sees test images.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from stages.core.graph.source import Source
from stages.core.handover.networks import load_sources, network_path
from stages.core.images.batches import Batches
from stages.core.images.load import load_images
from stages.core.recipe.recipe import load_recipe
from stages.core.recipe.sections import ProbeSection
from stages.core.runtime.command import command
from stages.core.runtime.device import prepare
from stages.core.runtime.files import sha256, write_json
from stages.core.runtime.progress import Bar
from stages.core.settings.params import Params, load_params
from stages.core.settings.places import DATA
from stages.probe import chance
from stages.probe.candidates import merged_row, reference_row
from stages.probe.evaluate import evaluate
from stages.probe.latency import relative_latency

# bytes: glibc asks the system anew for what is larger, which took a sixth of the time at 224 pixels
REUSED = 2**25

log = logging.getLogger(__name__)


def main(*names: str) -> None:
    params = load_params()
    device, profile = prepare(params.device, params.threads), params.active
    sources, recipe = load_sources(params, device), load_recipe(params)
    section = recipe.probe
    section = section.model_copy(update={"batch_size": at_once(section.batch_size, sources, device)})
    images = {split: labelled(params, section, split, device) for split in ("train", "test")}
    tasks = [(source.task.name, len(source.task.classes)) for source in sources]
    rows = names or [*recipe.methods, "ensemble", "oracle"]
    count = sum(len(truth) for split in images.values() for _, truth in split)
    with Bar(total=len(rows) * count, unit="image") as bar:
        images = {
            split: [(Watched(own, bar), truth) for own, truth in found] for split, found in images.items()
        }
        for name in rows:
            bar.set_description(f"probe {name}")
            if name in ("oracle", "ensemble"):
                row = reference_row(name, sources, profile.labels)
            else:
                recipe.method(name)
                path = Path(f"models/recalibrate/{name}.safetensors")
                row = merged_row(path, sources, profile.labels, device)
            with threadpool_limits(torch.get_num_threads()):
                scores = evaluate(row.candidate, images, tasks, profile.labels == "separate", section.penalty)
            cost = {kind: round(value, 6) for kind, value in row.cost.items()}
            found = {
                "method": name,
                "budget": row.budget,
                "tasks": scores,
                "cost": cost,
                "images": recipe.fit.images,
            }
            if name == "oracle":
                found["sha256"] = {str(network_path(s.task.name)): s.about["sha256"] for s in sources}
                found["at_chance"] = at_chance(scores, [truth for _, truth in images["test"]])
            elif name != "ensemble":
                found["sha256"] = {str(path): sha256(path)}
            write_json(f"reports/probe/{name}.json", found)
            first = next(iter(profile.tasks.values())).data
            x = torch.zeros(section.latency_batch, first.channels, first.size, first.size, device=device)
            executed = row.tune(x)
            latency = relative_latency(row.forward, sources, x, section.latency_repeats)
            write_json(
                f"reports/probe/{name}.latency.json",
                {"latency": round(latency, 4), "executed": round(executed, 4)},
            )


@dataclass(frozen=True)
class Watched:
    """Batches that are counted as they go by."""

    batches: Iterable[Tensor]
    bar: Bar

    def __iter__(self) -> Iterator[Tensor]:
        for x in self.batches:
            yield x
            self.bar.update(len(x))


def at_once(batch_size: int, sources: Sequence[Source], device: torch.device) -> int:
    """How many images to run at once: on a CPU no more than leave their largest value in reused memory."""
    if device.type != "cpu":
        return batch_size
    largest = max(source.trace.largest for source in sources)
    return max(1, min(batch_size, REUSED // (4 * largest)))


def at_chance(scores: dict[str, dict[str, float]], truths: list[Tensor]) -> list[str]:
    """Tasks whose own source network is no better than guessing on its test images; each is a warning too."""
    found = []
    for (task, own), truth in zip(scores.items(), truths, strict=True):
        if chance.at_chance(own["accuracy"], truth):
            log.warning(chance.warning(task, own["accuracy"], truth))
            found.append(task)
    return found


def labelled(
    params: Params, section: ProbeSection, split: str, device: torch.device
) -> list[tuple[Batches, Tensor]]:
    """For each task preprocessed batches and labels, at most as many as params.yaml says."""
    limit = {"train": section.linear_images, "test": section.test_images}[split]
    found = []
    for task in params.active.tasks.values():
        own = load_images(task.data, split, DATA, limit=limit)
        found.append((Batches(own.images, section.batch_size, task.data, device), own.labels))
    return found


if __name__ == "__main__":
    command(main, "...")
