"""Every method of the full list through the stages, from networks that were trained for a moment."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from stages.core.settings.params import load_params

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(stage: str, *names: str) -> None:
    importlib.import_module(f"stages.{stage}.__main__").main(*names)


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
        average = metrics[name]["average"]
        assert 0 < average["accuracy"] <= 100
        assert 1 <= average["macs"] <= budget
    assert len(list((folder / "reports/plots").glob("*.png"))) == 5
