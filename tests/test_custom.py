"""The documented way to merge two networks of one's own, done as it is written there."""

import io
import re
import shlex

import pytest
import torch
import yaml
from PIL import Image
from test_end_to_end import ROOT, Clone

from stages.core.merged.file import load_merged
from stages.core.networks.architectures import build
from stages.core.settings.params import load_params

pytestmark = pytest.mark.slow
SECTION = (ROOT / "docs/own_networks.md").read_text().split("## A profile by hand\n")[1]
YAML, *COMMANDS = re.findall(r"```(?:yaml)?\n(.*?)```", SECTION, re.S)
PROFILE = load_params(ROOT / "params.yaml").profiles["custom"]


def picture(hue):
    noise = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(hue)) * 60
    pixels = noise + torch.tensor([hue % 5 * 40, hue % 3 * 60, hue % 7 * 25]).view(3, 1, 1)
    content = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy()).save(content, "JPEG")
    return content.getvalue()


def put_files(own):
    """Step 1: two checkpoints and two image folders of as many classes as the heads have."""
    for seed, (name, task) in enumerate(PROFILE.tasks.items()):
        torch.manual_seed(seed)
        architecture = PROFILE.architecture_of(name)
        network = build(architecture.name, architecture.arguments)
        network(torch.rand(16, 3, task.data.size, task.data.size))  # running statistics
        own.mkdir(parents=True, exist_ok=True)
        torch.save({"model": network.state_dict(), "epoch": 3}, own / task.checkpoint)
        for c in range(architecture.arguments["classes"]):
            for part, count in (("train", 12), ("test", 4)):
                folder = own / name / part / f"class {c}"
                folder.mkdir(parents=True)
                for i in range(count):
                    (folder / f"{i}.jpg").write_bytes(picture(1000 * seed + 100 * c + 10 * i + len(part)))


def test_the_profile_on_the_page_is_the_one_in_params():
    written = yaml.safe_load(YAML)["custom"]
    assert written == yaml.safe_load((ROOT / "params.yaml").read_text())["profiles"]["custom"]


def test_the_section_fits_a_screen():
    steps = SECTION[: SECTION.index("The published experiments")]
    assert len(steps.splitlines()) <= 50


def test_the_published_commands_name_profiles_and_allowed_budgets():
    profiles = yaml.safe_load((ROOT / "published.yaml").read_text())["profiles"]
    for command in COMMANDS[1].splitlines():
        settings = dict(re.findall(r"-S (\w+)=(\S+)", command))
        assert settings["profile"] in profiles
        assert settings["source"] == "s3"
        assert "-S profiles_from=published.yaml" in command
        assert all(1 <= float(budget) <= 2 for budget in settings.get("budget", "1").split(","))


def test_the_steps_of_the_page(tmp_path):
    clone = Clone(tmp_path / "clone")
    put_files(clone.folder / "data/own")
    text = (clone.folder / "params.yaml").read_text()
    text = re.sub(r"  (pleas_adam|progressive_refined): .*\n(    .*\n)?", "", text)  # 5 to 7 minutes each
    (clone.folder / "params.yaml").write_text(re.sub(r"\bimages: 400\b", "images: 40 ", text))
    (command,) = COMMANDS[0].splitlines()
    clone.run(*shlex.split(command))
    rows = clone.metrics()
    for method in load_params(clone.folder / "params.yaml").methods:
        assert {"first", "second", "average"} <= rows[method].keys()
        merged = load_merged(clone.folder / f"models/recalibrate/{method}.safetensors")
        x = torch.rand(2, 3, 32, 32)
        assert merged(x, task="first").shape == (2, 5)
        assert merged(x, task="second").shape == (2, 3)
    assert "progressive" in (clone.folder / "reports/table.md").read_text()
