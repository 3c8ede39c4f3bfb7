"""Dense networks: every unit may read every unit, and the fit uses that."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.core.merged.blocks import blocks_of
from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import Batch
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network

AVERAGE = Fit(solver="average")
PUBLISHED = Fit(solver="exact", inputs="source", targets="ensemble")
PROGRESSIVE = Fit(solver="exact", inputs="merged", targets="own", norm="fold")


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def perceptrons(sources, count, x, labels="shared"):
    networks = []
    for seed in range(count):
        torch.manual_seed(seed)
        networks.append(Perceptron().double().eval())
    return networks, sources(networks, x, labels)


def batches(x, count):
    return [Batch(own, task) for task, own in enumerate(x.chunk(count))]


@pytest.fixture
def x():
    return torch.randn(240, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [2, 3])
@torch.no_grad()
def test_the_fit_is_the_least_squares_over_all_inputs(sources, x, count):
    """PLeaS on the second layer, against torch.linalg.lstsq, units as they lie in the merged network."""
    networks, made = perceptrons(sources, count, x)
    split = full_split(made[0].trace.spec, {"a": range(4), "b": range(2)})
    network, _ = fit_network(
        made, identity_matching(made[0].trace.spec, count), split, batches(x, count), PUBLISHED,
        labels="shared", dense=True, ridge=1e-12, precision=torch.float64,
    )  # fmt: skip

    def merged_order(values, k):
        own = [value[:, k:] for value in values]
        return torch.cat([own[0], sum(value[:, :k] for value in values) / count, *own[1:]], 1)

    z = merged_order([F.relu(n.a(x)) for n in networks], 4)
    y = merged_order([n.b(F.relu(n.a(x))) for n in networks], 2)
    best = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1).double()], 1), y).solution
    layer = next(network.map_of(n) for n in network.trace.graph.nodes if n.name == "b")
    assert [tuple(weight.shape) for weight in layer.weights] == [(2 + 3 * count, 4 + 2 * count)]
    torch.testing.assert_close(layer.weights[0], best[:-1].T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias, best[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_is_further_from_its_targets_than_in_blocks(small, sources, splits, images, seed):
    made = sources([small(0), small(1)], images())
    data = [Batch(images(40, task), task) for task in (0, 1)]
    spec = made[0].trace.spec
    left = [
        fit_network(made, identity_matching(spec, 2), splits(spec, seed), data, PUBLISHED, labels="shared",
                    dense=dense, ridge=1e-9, precision=torch.float64)[1]
        for dense in (False, True)
    ]  # fmt: skip
    blocks, dense = ({line.layer: line.residual for line in own} for own in left)
    assert blocks
    assert blocks.keys() == dense.keys()
    assert all(dense[layer] <= blocks[layer] + 1e-7 for layer in blocks)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "fit", [AVERAGE, PUBLISHED, PROGRESSIVE], ids=["average", "published", "progressive"]
)
@torch.no_grad()
def test_of_everything_separate_there_are_zeros_between_the_networks(sources, x, count, fit):
    networks, made = perceptrons(sources, count, x, "separate")
    spec = made[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    network, _ = fit_network(
        made, identity_matching(spec, count), split, batches(x, count), fit, labels="separate", dense=True,
        precision=torch.float64,
    )  # fmt: skip
    for node in network.trace.graph.nodes:
        if node.linear:
            layer = network.map_of(node)
            there = torch.zeros_like(layer.weights[0], dtype=torch.bool)
            for block in blocks_of(layer.inputs, layer.outputs):
                there[block.start : block.stop, block.columns] = True
            assert there.all() == (node.name == "a")
            assert not layer.weights[0][~there].any()
            assert torch.equal(layer.dense_weight(), layer.weights[0])
    torch.testing.assert_close(network(x), torch.cat([own(x) for own in networks], 1))
    for name, own in zip("abc", networks, strict=False):
        torch.testing.assert_close(network(x, task=name), own(x))


@torch.no_grad()
def test_blocks_between_networks_are_used(sources, x):
    _, made = perceptrons(sources, 2, x)
    split = full_split(made[0].trace.spec, {"a": range(4), "b": range(2)})
    network, _ = fit_network(
        made, identity_matching(made[0].trace.spec, 2), split, batches(x, 2), PROGRESSIVE, labels="shared",
        dense=True, precision=torch.float64,
    )  # fmt: skip
    layer = next(network.map_of(n) for n in network.trace.graph.nodes if n.name == "b")
    assert layer.weights[0][:3, -2:].abs().min() > 0  # units of the first network read those of the second
