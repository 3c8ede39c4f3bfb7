"""The three ways in of docs/own_networks.md, as they are written there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from stages import new
from stages.core.settings.params import load_params

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/own_networks.md").read_text()
NOTEBOOK, DISK, BUCKET, _ = re.split(r"\n## ", TEXT)[1:]


def code(section: str) -> str:
    return re.search(r"```\w+\n(.*?)```", section, re.S)[1]


def commands(section: str) -> list[list[str]]:
    return [shlex.split(line) for line in code(section).replace("\\\n", " ").splitlines()]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    ).eval()


def test_two_modules_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {f"net_{name}": network(seed) for seed, name in enumerate("ab")}
    names |= {f"batches_{name}": [torch.rand(8, 3, 6, 6) for _ in range(2)] for name in "ab"}
    names["images"] = torch.rand(5, 3, 6, 6)
    exec(compile(code(NOTEBOOK), "docs/own_networks.md", "exec"), names)
    assert names["other"](names["images"]).shape == (5, 4)
    assert 1.0 <= names["merged"].about["budget"]["reached"] <= 1.2


def test_two_checkpoints_on_disk(own, tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(own, tmp_path / "networks")
    monkeypatch.chdir(tmp_path)
    write, run = commands(DISK)
    assert write[:3] == ["python", "-m", "stages.new"]
    new.main(*write[3:])
    assert set(load_params().profiles["my_pair"].tasks) == {"first", "second"}
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)[1] == shlex.join(run)


def test_a_published_experiment():
    listed, run = commands(BUCKET)
    settings = dict(word.split("=") for word in run if "=" in word)
    profiles = yaml.safe_load((ROOT / settings["profiles_from"]).read_text())["profiles"]
    profile = profiles[settings["profile"]]
    assert settings["source"] == "s3"
    keys = [
        task["checkpoint"].format(folder=profile["folder"], variant=variant)
        for task, variant in zip(profile["tasks"].values(), profile["variants"], strict=True)
    ]
    assert listed[:4] == ["python", "-m", "stages.artifacts", "list"]
    assert any(key.startswith(listed[4]) for key in keys)


@pytest.mark.parametrize("section", [NOTEBOOK, DISK, BUCKET])
def test_each_is_short(section):
    assert len(code(section).splitlines()) <= 10
