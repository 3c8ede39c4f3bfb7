"""What looks at a network's logits, on networks that have some at each of several places."""

import pytest
import torch
from head_styles import HEADS

from stages import merge
from stages.core.recipe.known import known_methods
from stages.probe.evaluate import OneForAll, collect

ROWS = ("progressive_refined", "fs_merge", "neuron_interpolation", "tact", "pleas_adam")


def two(head, images=24):
    make, shape = HEADS[head]
    generator, networks = torch.Generator().manual_seed(1), {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        networks[name] = make().eval()
    return networks, {name: [torch.randn(images, *shape, generator=generator)] for name in networks}


@pytest.mark.parametrize("head", ["convolutional head", "head of frames", "head of a series"])
@pytest.mark.parametrize("labels", ["separate", "shared"])
@pytest.mark.parametrize("row", ROWS)
def test_methods_merge_them_and_they_are_probed(head, labels, row):
    networks, images = two(head)
    method = known_methods().methods[row].model_dump(exclude_unset=True)
    if "refine" in method["fit"]:
        method["fit"]["refine"] = {"steps": 2, "images": 20, "every": 1}
    found = merge(networks, images, 1.3, method, labels=labels, progress=False)
    logits, features = collect(OneForAll(found), images["a"], 0)
    assert logits.shape == (24, 6 if labels == "separate" else 3)
    assert len(features) == 24
    assert torch.isfinite(logits).all()
    if labels == "separate":
        torch.testing.assert_close(found(images["a"][0], task="a"), logits[:, :3], rtol=1e-4, atol=1e-5)


def test_more_classes_in_one_head_than_in_the_other():
    networks, images = two("convolutional head")
    networks["b"].head = torch.nn.Conv2d(5, 4, 1)
    refined = {
        "match": "identity",
        "fit": {"solver": "average", "refine": {"steps": 2, "images": 20, "every": 1}},
    }
    for budget, method in ((1.0, "average"), (2.0, "progressive"), (1.4, refined)):
        found = merge(networks, images, budget, method, progress=False)
        assert found(images["a"][0]).shape == (24, 7)
        assert found(images["a"][0], task="b").shape == (24, 4)
        plain = found.plain("b")
        torch.testing.assert_close(plain(images["a"][0]), found(images["a"][0], task="b"))


def test_probing_looks_at_the_mean_over_the_map_that_a_convolution_reads():
    networks, images = two("convolutional head")
    found = merge(networks, images, 1.0, "average", progress=False)
    x = images["a"][0]
    torch.testing.assert_close(collect(OneForAll(found), [x], 0)[1], found.features(x).mean((2, 3)))
