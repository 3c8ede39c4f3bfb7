"""Every method of the full list through the stages, from networks that were trained for a moment."""

import importlib
import json
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml

from stages.core.images.batches import normalise
from stages.core.images.load import load_images
from stages.core.merged.file import load_merged
from stages.core.runtime.files import sha256
from stages.core.settings.params import load_params
from stages.core.settings.places import DATA

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(stage: str, *names: str) -> None:
    importlib.import_module(f"stages.{stage}.__main__").main(*names)


@torch.no_grad()
def accuracies(params, name: str) -> dict[str, float]:
    """Of a merged network as a user runs it, on each task's test images, in percent."""
    network, found = load_merged(f"models/recalibrate/{name}.safetensors"), {}
    for task, own in params.active.tasks.items():
        test = load_images(own.data, "test", DATA)
        told = task if network.labels == "separate" or network.corrected else None
        logits = network(normalise(test.images, own.data.mean, own.data.std), task=told)
        found[task] = 100 * float((logits.argmax(1) == test.labels).double().mean())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workspace with params.yaml alone."""
    found = tmp_path_factory.mktemp("methods")
    shutil.copy(ROOT / "params.yaml", found)
    return found


@pytest.mark.parametrize(
    ("profile", "budget"), [("digits", 1.3), ("digits_split", 1.0), ("digits_four", 2.2)]
)
def test_every_method_of_the_full_list_runs(profile, budget, folder, monkeypatch):
    monkeypatch.chdir(folder)
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content |= {"profile": profile, "budget": budget, "methods": content["full"], "threads": 1}
    content["profiles"][profile]["finetune"]["epochs"] = 2
    content["profiles"][profile]["architecture"]["arguments"]["width"] = 4
    for section in ("statistics", "fit", "recalibrate"):
        content[section]["images"] = 60
    content["probe"] |= {"linear_images": 60, "latency_repeats": 1}
    for method in content["full"].values():
        if method["fit"]["solver"] == "adam":
            method["fit"]["steps"] = 5
        if "refine" in method["fit"]:
            method["fit"]["refine"] = {"steps": 4, "every": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    params = load_params()
    for stage in ("artifacts", "finetune", "statistics", "match", "allocate"):
        run(stage)
    for name in params.methods:
        run("fit", name)
    for stage in ("recalibrate", "probe", "report"):
        run(stage)
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    assert set(metrics) == {*params.methods, "ensemble", "oracle"}
    for name in params.methods:
        assert 1 <= metrics[name]["average"]["macs"] <= budget
        again = accuracies(params, name)
        for task, accuracy in again.items():
            assert metrics[name][task]["accuracy"] == pytest.approx(accuracy, abs=0.051), (name, task)
        assert metrics[name]["average"]["accuracy"] == pytest.approx(mean(again.values()), abs=0.051), name
    networks = {sha256(folder / f"models/recalibrate/{name}.safetensors") for name in params.methods}
    assert len(networks) == len(params.methods)  # no row is another by mistake
    assert len(list((folder / "reports/plots").glob("*.png"))) == 5
