"""The merged network in a file that other programs run."""

import json
import sys
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from styles import STYLES
from torch.onnx._internal.exporter import _registration

from stages.api import merge
from stages.core.graph.source import Task
from stages.core.runtime.errors import InputError
from stages.report import export as export_module
from stages.report.export import export, main


@pytest.fixture(autouse=True, scope="module")
def _one_registry():
    """What torch has for each operation, read once: for every file anew it is half of the time."""
    registry = _registration.ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(cache(registry.from_torchlib)))
        yield


def merged(style, budget=1.3, layout="blocks"):
    networks, shape = [], STYLES[style][1]
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(STYLES[style][0]().eval())
    x = torch.randint(0, 11, (6, *shape)) if len(shape) == 1 else torch.randn(6, *shape)
    found = merge(
        dict(zip("ab", networks, strict=True)), {"a": [x[:3]], "b": [x[3:]]}, budget,
        {"fit": {"solver": "average"}, "match": {"by": "weights"}}, labels="separate", progress=False,
        options={"allocate": {"layout": layout}},
    )  # fmt: skip
    return found, x


def run(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(["logits"], {given.name: x.numpy()})[0]), session


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_onnxruntime_gives_what_the_merged_network_gives(style, tmp_path):
    network, x = merged(style)
    export(network, tmp_path / "model.onnx")
    for n in (6, 1) if style != "batch statistics" else (6,):
        found, session = run(tmp_path / "model.onnx", x[:n])
        torch.testing.assert_close(found, network(x[:n]), rtol=1e-3, atol=1e-4)
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["tasks"]) == {task.name: list(task.classes) for task in network.tasks}
    assert json.loads(properties["budget"])["asked"] == 1.3
    assert len(json.loads(properties["classes"])) == found.shape[1]


PREPROCESSING = {"a": {"size": 8, "mean": [0.5, 0.4, 0.3]}, "b": {"size": 8, "mean": [0.1, 0.2, 0.3]}}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("task", [None, "b"])
def test_preprocessing_and_class_names_are_in_the_file(suffix, task, tmp_path):
    network, _ = merged("option A")
    network.about |= {"preprocessing": PREPROCESSING}
    network.tasks = tuple(Task(name, tuple(f"{name} {c}" for c in "xyz")) for name in "ab")
    path = tmp_path / f"model{suffix}"
    export(network, path, task=task)
    if suffix == ".pt2":
        extra = {"about.json": ""}
        torch.export.load(path, extra_files=extra)
        found = json.loads(extra["about.json"])
    else:
        found = {own.key: json.loads(own.value) for own in onnx.load(path).metadata_props}
    assert found["preprocessing"] == PREPROCESSING
    assert found["tasks"] == {"a": ["a x", "a y", "a z"], "b": ["b x", "b y", "b z"]}
    assert found["classes"] == (["b x", "b y", "b z"] if task else ["a x", "a y", "a z", "b x", "b y", "b z"])
    assert (found["task"], found["labels"]) == (task, "separate")
    assert found["budget"] == network.about["budget"]


@pytest.mark.parametrize("style", ["option A", "shufflenet", "sequence first"])
@torch.no_grad()
def test_a_dense_network_is_exported_alike(style, tmp_path):
    network, x = merged(style, layout="dense")
    export(network, tmp_path / "model.onnx")
    torch.testing.assert_close(run(tmp_path / "model.onnx", x)[0], network(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_exported_program_gives_it_too(tmp_path):
    network, x = merged("option A")
    export(network, tmp_path / "model.pt2", task="b")
    extra = {"about.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    for n in (6, 1):
        torch.testing.assert_close(program(x[:n]), network(x[:n], "b"), rtol=1e-4, atol=1e-5)
    assert json.loads(extra["about.json"])["task"] == "b"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["other", "--to", "model.onnx"], "method: found 'other'; allowed: those in models/recalibrate, one"),
        (["one", "--to", "model.pth"], r"model.pth: found suffix '.pth'; allowed: .onnx, .pt2"),
        (["one"], "export: found one; allowed: METHOD --to"),
        (["one", "--to", "file/model.pt2"], "file/model.pt2: cannot be written"),
        (["one", "--to", "model.pt2", "--task", "c"], "task: found 'c'; allowed: a, b"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_nothing_is_written(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, _ = merged("log_softmax", 1.0)
    network.save("models/recalibrate/one.safetensors")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=line):
        main(*words)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_absent_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        InputError, match=r"onnxscript: not installed, .* pip install -r requirements-onnx.txt"
    ):
        export_module.check_target(tmp_path / "model.onnx")


def test_it_runs_as_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, _ = merged("log_softmax", 1.0)
    network.save("models/recalibrate/one.safetensors")
    main("one", "--to", "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size > 1000


def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    network, images = merged("option A")
    network.save("merged.safetensors")
    exec(compile(code, "docs/export.md", "exec"), {"images": images})
