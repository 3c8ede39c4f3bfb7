"""Model cards: what they say is what the network is, and the lines to load it run."""

import re

import pytest
import torch

from stages.core.graph.source import Task
from stages.core.merged.card import card
from stages.core.merged.cost import built_cost
from stages.core.merged.network import MergedNetwork
from stages.core.tracing.trace import trace

ABOUT = {
    "architecture": {"name": "resnet", "arguments": {"depth": 8}},
    "budget": {"asked": 1.5, "reached": 1.4987, "counted": "macs"},
    "method": {
        "name": "mine",
        "matching": {"by": "weights", "ridge": None},
        "fit": {"solver": "exact"},
        "match": "w",
    },
    "preprocessing": {"a": {"size": 8, "mean": [0.5, 0.5]}, "b": {"size": 8, "mean": [0.1, 0.2]}},
    "refined": {"steps": 40, "kept": 30, "curve": [1, 2]},
    "seed": 3,
    "sources": {"a": "0" * 64, "b": "1" * 64},
}


def network(small, images, labels="shared", dense=False, about=ABOUT, classes=("x", "y", "z")):
    traced = trace(small(0), images())
    shared = {name: group.size // 2 for name, group in traced.spec.free.items()}
    return MergedNetwork(
        traced, [Task("a", classes), Task("b", classes)], labels, shared, about=about, dense=dense
    )


@pytest.mark.parametrize("labels", ["shared", "separate"])
@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_a_card_says_what_the_network_is(small, images, tmp_path, labels, dense):
    made = network(small, images, labels, dense).double()
    path = tmp_path / "mine.safetensors"
    made.save(path)
    text = card(made, path)
    lines = text.splitlines()
    assert lines[0] == "# mine: one network for a and b"
    assert "Architecture: resnet (depth: 8)" in lines
    assert f"| a | 3: x, y, z | {'0' * 64} |" in lines
    assert "- matching: by weights" in lines
    assert "- fit: solver exact" in lines
    assert ("- layers: dense" in text) == dense
    assert "- budget asked: 1.5 times one source" in lines
    assert "- budget reached: 1.4987, counted in macs" in lines
    assert f"- multiply-accumulates of an image: {built_cost(made, 'macs'):,}, heads" in text
    assert f"- parameters: {sum(p.numel() for p in made.parameters()):,}, with them" in lines
    assert f"- units shared: {sum(made.shared.values())} of" in text
    assert "| b | 8 | \\[0.1, 0.2\\] |" in lines
    assert "- kept: 30" in lines
    x = images()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert len(code.splitlines()) == 3
    names = {"images": x}
    exec(code, names)
    assert torch.equal(names["logits"], made(x, None if labels == "shared" else "a"))


def test_what_is_not_known_is_said(small, images):
    text = card(network(small, images, about={}), "mine.safetensors")
    assert "| a | 3: x, y, z | not known |" in text
    assert "- budget asked: not known" in text
    assert "Preprocessing" not in text


def test_names_stay_where_they_belong(small, images):
    text = card(network(small, images, classes=("a|b", "<script>\n# x", "`c`")), "mine.safetensors")
    assert "| a | 3: a\\|b, \\<script\\> # x, \\`c\\` | " in text
    many = card(network(small, images, classes=tuple(map(str, range(1000)))), "mine.safetensors")
    assert ", 19, ... | " in many
    assert ", 20" not in many


def test_a_corrected_network_is_told_the_task(small, images):
    made = network(small, images)
    made.set_correction(made.trace.graph.nodes[1], torch.ones(2, 2, made.arrangement("conv1").width))
    assert "logits = merged(images, task='a')" in card(made, "mine.safetensors")
