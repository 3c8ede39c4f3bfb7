"""Synthetic results of the earlier stages, written where the report looks for them."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
METHODS = {  # accuracy on the two tasks
    "average": (31.04, 43.3),
    "git_rebasin": (45.25, 38.5),
    "activation_matching": (52.0, 41.75),
    "pleas": (70.5, 62.25),
    "pleas_adam": (66.0, 61.0),
    "progressive": (98.456, 97.9),
    "ensemble": (64.0, 66.5),
    "oracle": (99.75, 99.8),
}
FITTED = ("pleas", "progressive")
RESNET8 = ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2")


@pytest.fixture
def deep_groups() -> list[str]:
    """Group names of a deep bottleneck network: 70 or more."""
    names = ["conv1", "layer1.0.conv3"]
    for stage, blocks in enumerate((3, 4, 23, 3), start=1):
        names += [f"layer{stage}.{block}.conv{conv}" for block in range(blocks) for conv in (1, 2)]
        names += [f"layer{stage}.0.downsample.0"]
    return names


@pytest.fixture
def make_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that makes a folder with params.yaml and the files the report reads, and enters it."""

    def make(
        profile: str = "digits",
        budget: float = 1.0,
        groups: Sequence[str] = RESNET8,
        accuracies: Mapping[str, tuple[float, float]] = METHODS,
    ) -> Path:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params |= {"profile": profile, "budget": budget, "seed": 0}
        params["methods"] = {
            name: {
                "match": {"average": "identity", "git_rebasin": "weights"}.get(name, "activations"),
                "fit": {"solver": "exact" if name.startswith(FITTED) else "average"},
            }
            for name in accuracies
            if name not in ("ensemble", "oracle")
        }
        params["full"] = {}
        params["match"] = {name: {"by": name} for name in ("identity", "weights", "activations")}
        shutil.rmtree(tmp_path / "reports", ignore_errors=True)
        for stage in ("probe", "match", "allocate", "fit"):
            (tmp_path / "reports" / stage).mkdir(parents=True)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        (tmp_path / "models/recalibrate").mkdir(parents=True, exist_ok=True)
        for name in params["methods"]:
            (tmp_path / f"models/recalibrate/{name}.md").write_text(f"# {name}: one network\n")
        _probes(tmp_path / "reports/probe", params["profiles"][profile], accuracies, budget)
        _tables(tmp_path / "reports", groups, params["methods"], budget)
        monkeypatch.chdir(tmp_path)
        return tmp_path / "reports"

    return make


def _probes(
    folder: Path, profile: dict, accuracies: Mapping[str, tuple[float, float]], budget: float
) -> None:
    for name, percents in accuracies.items():
        tasks = {
            task: {"accuracy": percent, "probe": min(99.9, percent + 3)}
            for task, percent in zip(profile["tasks"], percents, strict=True)
        }
        if name == "oracle":
            for task in tasks.values():
                del task["probe"]
        elif profile["labels"] == "separate":
            for task in tasks.values():
                task["joint"] = task["accuracy"] - 12.5
        cost = {"oracle": 1.0, "ensemble": 2.0}.get(name, budget)
        content = {
            "method": name,
            "budget": budget,
            "tasks": tasks,
            "cost": {"macs": cost * 1.00123456, "parameters": cost},
            "images": 400,
        }
        if name != "ensemble":
            content["sha256"] = {f"models/{name}.safetensors": hashlib.sha256(name.encode()).hexdigest()}
        (folder / f"{name}.json").write_text(json.dumps(content))
        (folder / f"{name}.latency.json").write_text(json.dumps({"latency": cost * 1.0749}))


def _tables(folder: Path, groups: Sequence[str], methods: Mapping[str, dict], budget: float) -> None:
    noise = random.Random(0)
    for name, level in (("identity", 0.05), ("weights", 0.35), ("activations", 0.6)):
        match, allocate = (
            ["group,network,units,similarity,unmatched"],
            ["group,units,shared,separate,fraction"],
        )
        for index, group in enumerate(groups):
            similarity = (
                min(1, level + 0.2 * noise.random() + 0.1 * index / len(groups)) if level > 0.1 else 1
            )
            match.append(f"{group},rotated,64,{similarity},{0.05 + 0.03 * (index % 3)}")
            separate = round(64 * (budget - 1) * noise.random())
            allocate.append(f"{group},64,{64 - separate},{separate},{separate / 64}")
        (folder / f"match/{name}.csv").write_text("\n".join(match) + "\n")
        (folder / f"match/{name}.seconds.json").write_text('{"seconds": 0.5}')
        (folder / f"allocate/{name}.csv").write_text("\n".join(allocate) + "\n")
    for order, (method_name, method) in enumerate(methods.items()):
        rows = [
            f"{g},{0.4 / (1 + order) * noise.random() + 0.002 * i},{0.01 if order % 2 else ''}"
            for i, g in enumerate([*groups, "linear"])
        ]
        (folder / f"fit/{method_name}.seconds.json").write_text('{"seconds": 1.25}')
        if method["fit"]["solver"] != "average":
            (folder / f"fit/{method_name}.csv").write_text("\n".join(["layer,residual,ridge", *rows]) + "\n")


ROWS = ("average", "pleas", "progressive", "zipit", "zipit_progressive")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Workspaces of two profiles, two seeds and two budgets, with metrics that are known."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    found = []
    for profile in ("digits", "digits_split"):
        for seed in (0, 1):
            for budget in (1.0, 1.5):
                folder = tmp_path / f"{profile}-{seed}-{budget}"
                (folder / "reports").mkdir(parents=True)
                params |= {"profile": profile, "seed": seed, "budget": budget}
                params["methods"] = {name: params["full"][name] for name in ROWS}
                (folder / "params.yaml").write_text(yaml.safe_dump(params))
                metrics, timings = {}, {}
                for index, name in enumerate([*ROWS, "ensemble", "oracle"]):
                    average = {"accuracy": 50.0 + 5 * index + 2 * seed, "probe": 90.0, "macs": budget}
                    if profile == "digits_split":
                        average["joint"] = average["accuracy"] - 10
                    metrics[name] = {"average": average}
                    timings[name] = {"latency": budget, "seconds": 1.0 + index}
                (folder / "reports/metrics.json").write_text(json.dumps(metrics))
                (folder / "reports/timings.json").write_text(json.dumps(timings))
                found.append(folder)
    return found
