import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError


@given(
    blocks=st.integers(1, 3),
    width=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    classes=st.integers(2, 7),
    size=st.integers(4, 17),
)
@settings(max_examples=15, deadline=None)
def test_resnet_traces_and_has_the_stated_shape(blocks, width, channels, classes, size):
    depth = 6 * blocks + 2
    network = build(
        "resnet", {"depth": depth, "width": width, "channels": channels, "classes": classes}
    ).eval()
    x = torch.rand(2, channels, size, size)
    assert network(x).shape == (2, classes)
    torch.testing.assert_close(fx.symbolic_trace(network)(x), network(x))
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth + 2  # the two projection shortcuts do not count


def test_resnet20_has_the_published_number_of_parameters():
    network = build("resnet", {"depth": 20, "classes": 10})
    # He et al. 2016, table 6: 0.27 million, there with parameter-free shortcuts
    shortcuts = sum(p.numel() for name, p in network.named_parameters() if "downsample" in name)
    assert sum(p.numel() for p in network.parameters()) - shortcuts == 269_722


def test_every_activation_of_the_resnet_is_used_once():
    network = build("resnet", {"depth": 14, "width": 2, "classes": 3})
    called = [node.target for node in fx.symbolic_trace(network).graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    assert sum("relu" in name for name in called) == 1 + 2 * 6


def test_torchvision_resnets_are_built_with_the_asked_head():
    network = build("resnet18", {"classes": 7}).eval()
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_an_mlp_has_the_asked_layers():
    network = build("mlp", {"inputs": 12, "widths": [7, 5], "classes": 3})
    assert [tuple(p.shape) for p in network.parameters()] == [(7, 12), (7,), (5, 7), (5,), (3, 5), (3,)]
    assert network(torch.rand(2, 3, 2, 2)).shape == (2, 3)


@pytest.mark.parametrize("classes", ["classes", "num_classes"])
def test_any_constructor_that_can_be_imported_is_one(classes):
    network = build("torchvision.models:squeezenet1_1", {classes: 4, "dropout": 0.0}).eval()
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 4)
    assert build("stages.core.networks.architectures:ResNet", {"depth": 8, "classes": 3}).fc.out_features == 3


def test_a_small_vit_is_built_with_the_asked_size():
    network = build("vit_b_16", {"size": 32, "classes": 4}).eval()
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 4)


def test_torchvision_is_imported_only_when_needed():
    code = (
        "import sys; from stages.core.networks.architectures import build; "
        "build('resnet', {'depth': 8, 'classes': 2}); assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vgg", {}, "found 'vgg'; allowed: resnet, mlp, resnet18"),
        ("vgg", {}, "or package.module:function"),
        ("mlp", {"inputs": 4, "widths": 3, "classes": 2}, "widths: found 3 (int); allowed: a list of whole"),
        ("mlp", {"inputs": 4, "widths": [3, 0], "classes": 2}, "widths: found [3, 0] (list)"),
        ("mlp", {"inputs": [4], "widths": [3], "classes": 2}, "inputs: found [4] (list)"),
        ("vit_b_16", {"size": 100, "classes": 2}, "size: found 100 (int); allowed: a multiple of 16"),
        ("no.package:function", {}, "no.package:function cannot be imported (ModuleNotFoundError"),
        ("torchvision.models:nothing", {}, "torchvision.models:nothing cannot be imported (AttributeError"),
        (":resnet18", {}, ":resnet18 cannot be imported (ValueError"),
        ("torchvision.models:resnet18", {"deep": 1}, "cannot be called with deep (TypeError"),
        ("torchvision.models:list_models", {}, "gave list; allowed: a function that builds a torch module"),
        (
            "os:system",
            {"command": "touch started"},
            "os:system is builtin_function_or_method of posix",
        ),
        (
            "subprocess:run",
            {"args": "touch started"},
            "subprocess:run is function of subprocess; allowed: a class of",
        ),
        ("torch.hub:load", {}, "torch.hub:load is function of torch.hub"),
        ("pathlib:Path", {}, "pathlib:Path is type of pathlib; allowed: a class of torch modules"),
        ("resnet", {"depth": 10**9 + 6, "classes": 2}, "up to 2000"),
        ("resnet", {"depth": 8, "width": 10**6, "classes": 2}, "the network needs "),
        ("mlp", {"inputs": 2**24, "widths": [2**24], "classes": 2}, "the network needs 1048576."),
        ("torch.nn:Linear", {"in_features": 2**24, "out_features": 2**24}, "the network needs 1048576."),
        ("resnet", {"depth": 8, "classes": 2, "deep": 1}, "'deep'; allowed: depth, width, channels, classes"),
        ("resnet", {"depth": 9, "classes": 2}, "depth: found 9 (int); allowed: 8, 14, 20"),
        ("resnet", {"depth": 2, "classes": 2}, "depth: found 2"),
        ("resnet", {"depth": "8", "classes": 2}, "depth: found '8' (str)"),
        ("resnet", {"depth": 8, "classes": 2, "width": True}, "width: found True (bool)"),
        ("resnet", {"depth": 8, "classes": 2, "width": 0}, "width: found 0"),
        ("resnet", {"depth": 8, "classes": 2, "channels": 2}, "channels: found 2 (int); allowed: 1 or 3"),
        ("resnet", {"depth": 8}, "classes: found nothing"),
        ("resnet50", {"classes": 3, "channels": 1}, "'channels'; allowed: classes"),
    ],
)
def test_what_is_not_allowed_is_one_line(name, arguments, message):
    with pytest.raises(InputError) as caught:
        build(name, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
