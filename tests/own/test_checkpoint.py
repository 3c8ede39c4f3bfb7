"""Architectures by their keys and shapes: every known one is found, and what is not known is said."""

import sys
import types

import pytest
import torch
from torch import nn

from stages.core.networks.architectures import ARCHITECTURES, build
from stages.core.runtime.errors import InputError
from stages.own.checkpoint import class_counts, norms, recognise, with_classes_of

ARGUMENTS = {
    "resnet": {"depth": 14, "width": 5, "channels": 1},
    "mlp": {"inputs": 48, "widths": [7, 6]},
    "vit_b_16": {"size": 32},
}


def state(name, classes=7):
    """Keys and shapes alone: no memory."""
    with torch.device("meta"):
        return build(name, {**ARGUMENTS.get(name, {}), "classes": classes}).state_dict()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_known_architecture_is_found_with_its_arguments(name):
    found = recognise(state(name), "x.pth")
    assert (found.name, found.arguments) == (name, {**ARGUMENTS.get(name, {}), "classes": 7})


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod."])
def test_prefixes_of_all_keys_are_no_matter(prefix):
    arguments = {"depth": 8, "width": 4, "channels": 1, "classes": 3}
    state = {f"{prefix}{name}": own for name, own in build("resnet", arguments).state_dict().items()}
    assert recognise(state, "a.pth").arguments == arguments
    assert recognise(state, "a.pth", "resnet").name == "resnet"
    del state[f"{prefix}conv1.weight"]
    with pytest.raises(InputError, match=r"first conv1\.weight: not in the file"):
        recognise(state, "a.pth", "resnet", arguments)


def test_counters_may_be_missing():
    old = {key: tensor for key, tensor in state("resnet18").items() if "num_batches" not in key}
    assert recognise(old, "x.pth").name == "resnet18"


def test_the_nearest_is_named_with_what_differs():
    other = state("resnet50") | {"layer4.2.bn3.weight": torch.empty(5)}
    with pytest.raises(InputError, match=r"x.pth: not known .* nearest is resnet50, which differs in 1 tensors, "
                       r"first layer4.2.bn3.weight: \(5,\) in the file for \(2048,\)"):  # fmt: skip
        recognise(other, "x.pth")


def test_a_name_that_was_given_is_the_only_one_tried():
    with pytest.raises(InputError, match="nearest is resnet34"):
        recognise(state("resnet18"), "x.pth", "resnet34")
    with pytest.raises(InputError, match=r"architecture.name: found 'resnet19'"):
        recognise(state("resnet18"), "x.pth", "resnet19")


def plain(width: int, num_classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.GroupNorm(1, width), nn.Flatten(), nn.Linear(width, num_classes)
    )


def fixed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def test_an_imported_constructor_with_and_without_a_number_of_classes(monkeypatch):
    module = types.ModuleType("somebodys")
    module.plain, module.fixed = plain, fixed
    monkeypatch.setitem(sys.modules, "somebodys", module)
    found = recognise(plain(5, 4).state_dict(), "x.pth", "somebodys:plain", {"width": 5})
    assert found.arguments == {"width": 5, "classes": 4}
    assert recognise(fixed().state_dict(), "x.pth", "somebodys:fixed").arguments == {}
    with pytest.raises(InputError, match="cannot be called"):
        recognise(plain(5, 4).state_dict(), "x.pth", "somebodys:plain")
    with pytest.raises(InputError, match="differs in"):
        recognise(plain(5, 4).state_dict(), "x.pth", "somebodys:plain", {"width": 6})


def test_classes_and_norms():
    assert class_counts(state("vgg11_bn", 9))[0] == 9
    assert norms(plain(4)) == "1 GroupNorm"
    assert norms(fixed()) == "no norm layers"
    with pytest.raises(InputError, match="has no linear layer"):
        class_counts({"conv.weight": torch.empty(1)})


def test_a_convolution_may_be_the_head():
    with torch.device("meta"):
        found = {n: build("torchvision.models:squeezenet1_1", {"classes": n}).state_dict() for n in (2, 5)}
    architecture = recognise(found[2], "x.pth", "torchvision.models:squeezenet1_1")
    assert architecture.arguments == {"classes": 2}
    assert with_classes_of(architecture, found[5]).arguments == {"classes": 5}


def test_other_names_of_the_number_of_classes():
    made = types.ModuleType("spelled")
    made.torch, made.Net = (
        torch,
        type("Net", (nn.Module,), {"__init__": lambda self, n_classes: _head(self, n_classes)}),
    )
    made.Net.__module__ = "spelled"
    sys.modules["spelled"] = made
    try:
        assert build("spelled:Net", {"classes": 4}).head.out_features == 4
    finally:
        del sys.modules["spelled"]


def _head(module, classes):
    nn.Module.__init__(module)
    module.head = nn.Linear(3, classes)
