"""The merged network as an ordinary one: equal outputs, nothing of ours in it, the sources' names."""

import copy
import pickle

import pytest
import torch
from styles import STYLES
from torchvision.models import resnet18, resnet50, vgg16_bn
from torchvision.models.vision_transformer import VisionTransformer

from stages.api import merge
from stages.core.merged.file import load_merged
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError


def made(style, seed):
    torch.manual_seed(seed)
    return STYLES[style][0]().eval()


def images(style):
    shape = STYLES[style][1]
    return torch.randint(0, 11, (6, *shape)) if len(shape) == 1 else torch.randn(6, *shape)


def merged(networks, x, budget, labels="shared", by="weights", layout="blocks"):
    names = "abc"[: len(networks)]
    given = {name: [own] for name, own in zip(names, x.chunk(len(names)), strict=True)}
    return merge(
        dict(zip(names, networks, strict=True)), given, budget, {"fit": {"solver": "average"}, "match": {"by": by}},
        labels=labels, options={"allocate": {"layout": layout}}, progress=False,
    ).double()  # fmt: skip


def double(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_every_style_gives_the_same_at_every_budget(style):
    x = images(style)
    cases = [
        (1.0, "shared"),
        (1.3, "separate"),
        (2.0, "separate"),
        (2.0, "shared"),
        (1.4, "separate", "dense"),
    ]
    for budget, labels, *layout in cases:
        network = merged([made(style, 0), made(style, 1)], x, budget, labels, "weights", *layout)
        assert network.dense == (layout == ["dense"])
        for task in (None, "b") if labels == "separate" else (None,):
            for fold in (False, True):
                plain = network.plain(task, fold)
                wanted = network(double(x), task)
                torch.testing.assert_close(plain(double(x)), wanted, rtol=1e-8, atol=1e-8)
                torch.testing.assert_close(
                    plain(double(x)[:2]), network(double(x)[:2], task), rtol=1e-8, atol=1e-8
                )


@pytest.mark.parametrize("style", ["option A", "shufflenet", "sequence first"])
@pytest.mark.parametrize("layout", ["blocks", "dense"])
@torch.no_grad()
def test_three_networks_in_one(style, layout):
    """Shares of a third are rounded to float32 when the network is built."""
    x = images(style)
    for budget, labels in ((1.0, "shared"), (1.5, "separate"), (1.5, "shared"), (3.0, "separate")):
        network = merged([made(style, seed) for seed in range(3)], x, budget, labels, "weights", layout)
        for task in (None, "c") if labels == "separate" else (None,):
            wanted = network(double(x), task)
            for fold in (False, True):
                found = network.plain(task, fold)(double(x))
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_nothing_of_ours_is_in_it():
    x = images("option A")
    plain = merged([made("option A", 0), made("option A", 1)], x, 1.3).plain()
    assert all(type(module).__module__.startswith("torch.") for module in list(plain.modules())[1:])
    assert b"stages" not in pickle.dumps(plain)
    assert "stages" not in plain.code
    for again in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
        assert torch.equal(again(x.double()), plain(x.double()))
        assert again.state_dict().keys() == plain.state_dict().keys()


CLASSES = {
    "resnet18": (lambda: resnet18(num_classes=3), 32),
    "vgg16_bn": (lambda: _small_vgg(), 32),
    "vit": (lambda: VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=3), 16),
    "cifar resnet": (lambda: build("resnet", {"depth": 8, "width": 4, "channels": 3, "classes": 3}), 16),
}


def _small_vgg():
    network = vgg16_bn(num_classes=3)
    network.avgpool = torch.nn.AdaptiveAvgPool2d(1)
    network.classifier = torch.nn.Sequential(
        torch.nn.Linear(512, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )
    return network


@pytest.mark.parametrize(
    "make", [*CLASSES.values(), pytest.param((lambda: resnet50(num_classes=3), 64), marks=pytest.mark.slow)],
    ids=[*CLASSES, "resnet50"],
)  # fmt: skip
@torch.no_grad()
def test_of_the_sources_size_its_state_loads_into_the_original_class(make):
    make, size = make
    networks, x = [make().eval() for _ in range(2)], torch.randn(4, 3, size, size)
    network = merged(networks, x, 1.0, "separate", "identity")
    plain, original = network.plain(task="b"), make().double().eval()
    original.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(original(x.double()), network(x.double(), "b"), rtol=1e-6, atol=1e-6)


def trained(network, x, steps=10):
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), 0.05)
    y, losses = torch.arange(len(x)) % 3, []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(network(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", ["merged", "plain"])
def test_ten_steps_of_a_plain_loop_lower_the_loss(form):
    x = images("option A")
    network = merged([made("option A", 0), made("option A", 1)], x, 1.3)
    before, x = {n: t.clone() for n, t in network.state_dict().items()}, x.double()
    losses = trained(network if form == "merged" else network.plain(), x)
    assert losses[-1] < losses[0]
    if form == "plain":  # it has copies
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@torch.no_grad()
def test_a_merged_network_is_copied_pickled_and_compiled():
    x = images("option A")
    network = merged([made("option A", 0), made("option A", 1)], x, 1.3)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(again(x.double()), network(x.double()))


@pytest.mark.parametrize("labels", ["shared", "separate"])
@torch.no_grad()
def test_a_merged_network_is_compiled_as_one_graph(labels):
    x = images("option A")
    network = merged([made("option A", 0), made("option A", 1)], x, 1.3, labels)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.double()), network(x.double()))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_the_merged_and_the_plain_network():
    x = images("option A")
    network = merged([made("option A", 0), made("option A", 1)], x, 1.3).float()
    for form in (network, network.plain(fold=True)):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(form)(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_task_that_is_not_there_is_refused():
    x = images("option A")
    network = merged([made("option A", 0), made("option A", 1)], x, 1.0, "separate")
    with pytest.raises(InputError, match=r"task: found 'c'; allowed: a, b"):
        network.plain(task="c")


@torch.no_grad()
def test_corrections_of_each_task_are_in_it(tmp_path):
    x = images("option A")
    network = merge(
        {"a": made("option A", 0), "b": made("option A", 1)}, {"a": [x[:3]], "b": [x[3:]]}, 1.3,
        {"fit": {"solver": "average"}, "match": {"by": "weights"}, "recalibrate": "tact"}, labels="separate",
        progress=False,
    )  # fmt: skip
    assert network.corrected
    network.save(tmp_path / "merged")
    network = load_merged(tmp_path / "merged").double()
    for task in (None, "a", "b"):
        for fold in (False, True):
            plain = network.plain(task, fold)
            torch.testing.assert_close(plain(x.double()), network(x.double(), task), rtol=1e-8, atol=1e-8)
