"""The GPU path: on a GPU where there is one, and on one that is not there, which finds what is on the wrong device."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, spread
from pretend import OnGPU, pretend_gpu

from stages import merge
from stages.core.networks.architectures import build
from stages.core.settings.params import load_params

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat([b, a]),
        lambda a, b: b.index_select(0, torch.tensor([0], device=a.device)),
        lambda a, b: b[torch.tensor([0], device=a.device)],
        lambda a, b: a.__setitem__(0, b),
        lambda a, b: a.numpy(),
        lambda a, b: torch.nn.Linear(2, 2)(a),
        lambda a, b: torch.rand(2, device=a.device, generator=torch.Generator()),
        lambda a, b: torch.nn.Linear(2, 2).to(a.device)(b),
    ],
)
def test_the_pretended_gpu_refuses_what_cuda_refuses(mixed):
    with pretend_gpu() as gpu:
        on_gpu, on_cpu = torch.ones(2, 2).to(gpu), torch.ones(2, 2)
        with pytest.raises((RuntimeError, TypeError), match=r"device|numpy|generator|on cpu"):
            mixed(on_gpu, on_cpu)


def test_the_pretended_gpu_allows_what_cuda_allows():
    with pretend_gpu() as gpu:
        a = torch.arange(6, device=gpu).view(2, 3)
        assert (a.device, a.is_cuda) == (gpu, True)
        assert a.cpu().device == CPU
        assert (a * torch.tensor(2))[torch.tensor([1])].device == gpu
        assert {a.to(torch.float64).device, a.new_zeros(2).device} == {gpu}
        assert torch.zeros(2, 3).copy_(a).device == CPU
        network = torch.nn.Linear(3, 2).to(gpu)
        network(a.float()).sum().backward()
        assert network.weight.grad.device == gpu
        assert not isinstance(torch.ones(2), OnGPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_leaves_nothing_on_the_wrong_device(family, randomise):
    make, side = FAMILIES[family]
    networks = {name: spread(randomise(make(), seed), seed) for seed, name in enumerate("ab")}
    images = {name: [torch.randn(6, 3, side, side, dtype=torch.float64)] for name in networks}
    expected = merge(networks, images, 1.3, progress=False)
    with pretend_gpu() as gpu, torch.no_grad():
        found = merge({n: net.to(gpu) for n, net in networks.items()}, images, 1.3, progress=False)
        x = torch.cat(images["a"])
        assert all(p.device == gpu for p in found.parameters())
        torch.testing.assert_close(
            found(x.to(gpu)).cpu(), expected(x)
        )  # other layouts of memory round otherwise


@pytest.mark.parametrize("family", FAMILIES)
def test_refining_leaves_nothing_on_the_wrong_device(family, randomise):
    make, side = FAMILIES[family]
    networks = {name: spread(randomise(make(), seed), seed) for seed, name in enumerate("ab")}
    images = {name: [torch.randn(6, 3, side, side, dtype=torch.float64)] for name in networks}
    refined = {"steps": 2, "every": 1, "batch_size": 2, "features": "stages"}
    method = {"match": "identity", "fit": {"solver": "average", "refine": refined}}
    expected = merge(networks, images, 1.3, method, progress=False)
    with pretend_gpu() as gpu:
        on_gpu = {n: net.to(gpu) for n, net in networks.items()}
        found = merge(on_gpu, images, 1.3, method, progress=False)
        assert all(p.device == gpu for p in found.parameters())
        curves = [[loss for _, loss in net.about["refined"]["curve"]] for net in (found, expected)]
        assert len(curves[0]) == 3
        assert curves[0] == pytest.approx(curves[1], rel=1e-2)  # Adam makes a step of any rounding of a zero


@pytest.mark.slow
def test_every_method_of_the_full_list_leaves_nothing_on_the_wrong_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content |= {"profile": "digits_split", "budget": 1.3, "methods": content["full"], "threads": 1}
    content["profiles"]["digits_split"]["finetune"]["epochs"] = 1
    content["profiles"]["digits_split"]["architecture"]["arguments"]["width"] = 4
    for section in ("statistics", "fit", "recalibrate"):
        content[section]["images"] = 40
    content["probe"] |= {"linear_images": 40, "latency_repeats": 1}
    for method in content["full"].values():
        if method["fit"]["solver"] == "adam":
            method["fit"]["steps"] = 3
        if method["fit"]["solver"] in ("fs_merge", "interpolation"):
            method["fit"]["epochs"] = 1
        if "refine" in method["fit"]:
            method["fit"]["refine"] = {"steps": 2, "every": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))

    def run(stage: str, *names: str) -> None:
        importlib.import_module(f"stages.{stage}.__main__").main(*names)

    run("artifacts")
    with pretend_gpu():
        for stage in ("finetune", "statistics", "match", "allocate"):
            run(stage)
        for name in load_params().methods:
            run("fit", name)
        for stage in ("recalibrate", "probe", "report"):
            run(stage)
    assert set(json.loads((tmp_path / "reports/metrics.json").read_text())) >= set(content["full"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("arguments", [{"depth": 8, "width": 16, "classes": 10}])
def test_a_gpu_agrees_with_the_cpu(arguments):
    """To 1e-3 of the logits' size: sums in float32 are in another order, and 20 layers hand it on."""
    networks = {name: build("resnet", arguments).eval() for name in "ab"}
    images = {name: [torch.randn(64, 3, 32, 32)] for name in networks}
    expected = merge(networks, images, 1.46, progress=False)
    found = merge({name: net.cuda() for name, net in networks.items()}, images, 1.46, progress=False)
    x = torch.cat(images["a"])
    with torch.no_grad():
        wanted = expected(x)
        difference = (found(x.cuda()).cpu() - wanted).abs().max() / wanted.abs().max()
    assert difference < 1e-3
