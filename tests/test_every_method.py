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
    check_runs(profile, budget, folder, monkeypatch)


FEW = ("average", "pleas_adam", "progressive", "regmean", "progressive_refined", "repair", "tact")


@pytest.mark.parametrize(("profile", "budget"), [("digits_split", 1.5), ("digits_four", 2.2)])
def test_dense_networks_run_through_the_stages(profile, budget, folder, monkeypatch):
    check_runs(profile, budget, folder, monkeypatch, FEW, {"layout": "dense", "multiple": 2})
    for name in FEW:
        network = load_merged(f"models/recalibrate/{name}.safetensors")
        assert network.dense
        for group, shared in network.shared.items():
            size = network.trace.spec.groups[group].size
            assert (shared + network.networks * (size - shared)) % 2 == 0 or shared in (0, size)
        for folder in ("models/recalibrate", "reports/cards"):
            assert "layers: dense" in Path(f"{folder}/{name}.md").read_text()
    assert "## Measured" in Path("reports/cards/progressive.md").read_text()


def check_runs(profile, budget, folder, monkeypatch, names=None, allocate=None):
    monkeypatch.chdir(folder)
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    methods = {name: content["full"][name] for name in names or content["full"]}
    content |= {"profile": profile, "budget": budget, "methods": methods, "threads": 1}
    content["allocate"] |= allocate or {}
    content["profiles"][profile]["finetune"]["epochs"] = 2
    content["profiles"][profile]["architecture"]["arguments"]["width"] = 4
    for section in ("statistics", "fit", "recalibrate"):
        content[section]["images"] = 60
    content["probe"] |= {"linear_images": 60, "latency_repeats": 1}
    for method in content["full"].values():
        if method["fit"]["solver"] == "adam":
            method["fit"]["steps"] = 5
        if method["fit"]["solver"] in ("fs_merge", "interpolation"):
            method["fit"]["epochs"] = 2
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
    assert len(list((folder / "reports/plots").glob("*.png"))) == 6
