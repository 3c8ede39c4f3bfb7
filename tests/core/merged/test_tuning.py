"""Layers that run at once: chosen by measurement, in memory only, the same results."""

import copy
import pickle

import pytest
import torch

from stages.core.graph.source import Task
from stages.core.merged.cost import built_cost, split_cost
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.errors import InputError
from stages.core.tracing.trace import trace


@pytest.fixture(params=[("shared", 2), ("separate", 2), ("shared", 3)], ids=str)
def network(request, small, images):
    """Random weights, half of each group shared."""
    labels, count = request.param
    traced = trace(small(0), images())
    shared = {name: group.size // 2 for name, group in traced.spec.free.items()}
    tasks = [Task(str(m), ("x", "y", "z")) for m in range(count)]
    made = MergedNetwork(traced, tasks, labels, shared).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def clock(monkeypatch, *times):
    """What is measured of each pair of runs, in turn; the last for ever."""
    waiting = list(times)

    def fastest(runs, like, repeats=1):
        for run in runs:
            run()
        return list(waiting.pop(0) if len(waiting) > 1 else waiting[0])

    monkeypatch.setattr("stages.core.merged.tuning.fastest", fastest)


def tuned(network):
    return [own for own in network.maps.values() if getattr(own, "at_once", False)]


@torch.no_grad()
def test_what_runs_at_once_gives_the_same_and_counts_its_zeros(network, images, monkeypatch):
    x = images()
    blocks, counted = network(x), built_cost(network, "macs")
    clock(monkeypatch, (2.0, 1.0))
    found = network.tune(x)
    assert found.layers
    assert all(layer.at_once for layer in found.layers)
    assert len(tuned(network)) == len(found.layers)
    torch.testing.assert_close(network(x), blocks)
    assert built_cost(network, "macs") == counted
    dense = split_cost(network.trace, {n: torch.zeros(s) for n, s in network.trace.parameters.items()},
                       network.labels, "macs", network.shared, network.networks, dense=True)  # fmt: skip
    assert built_cost(network, "macs", executed=True) == dense > counted
    for task in [own.name for own in network.tasks] if network.labels == "separate" else []:
        torch.testing.assert_close(network(x, task), blocks.split(3, 1)[int(task)])
    network.untune()
    assert torch.equal(network(x), blocks)
    assert built_cost(network, "macs", executed=True) == counted


@torch.no_grad()
def test_a_layer_that_is_no_faster_stays_in_blocks(network, images, monkeypatch):
    clock(monkeypatch, (2.0, 1.0), (1.0, 0.99), (2.0, 1.0))
    found = network.tune(images())
    assert [layer.at_once for layer in found.layers] == [True, False] + [True] * (len(found.layers) - 2)
    clock(monkeypatch, (1.0, 2.0))
    assert not any(layer.at_once for layer in network.tune(images()).layers)
    assert not tuned(network)


@torch.no_grad()
def test_what_makes_the_whole_no_faster_is_undone(network, images, monkeypatch):
    count = len(network.tune(images()).layers)
    clock(monkeypatch, *[(2.0, 1.0)] * count, (1.0, 1.1))
    found = network.tune(images())
    assert not any(layer.at_once for layer in found.layers)
    assert not tuned(network)
    assert found.seconds == (1.0, 1.0)


@torch.no_grad()
def test_weights_that_change_are_seen(network, images, tmp_path, monkeypatch):
    x = images()
    clock(monkeypatch, (2.0, 1.0))
    before = network(x)
    network.save(tmp_path / "blocks")
    network.tune(x)
    network(x)
    network.save(tmp_path / "tuned")
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "tuned").read_bytes()
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(again(x), before)
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()})
    torch.testing.assert_close(network(x), in_blocks(network)(x))
    network.maps["conv4_"].weights[0].data = torch.ones_like(network.maps["conv4_"].weights[0])
    torch.testing.assert_close(network(x), in_blocks(network)(x))
    network.float()
    torch.testing.assert_close(network(x.float()), in_blocks(network)(x.float()), rtol=1e-4, atol=1e-4)


def side_by_side(network):
    """Random weights and statistics, nothing shared."""
    made = MergedNetwork(
        network.trace, network.tasks, network.labels, dict.fromkeys(network.shared, 0)
    ).double()
    generator = torch.Generator().manual_seed(0)
    for own in [*made.parameters(), *(b for n, b in made.named_buffers() if "running" in n)]:
        own.data.copy_(torch.rand(own.shape, generator=generator) + 0.1)
    return made


def in_blocks(network):
    found = copy.deepcopy(network)
    found.untune()
    return found


def test_gradients_are_those_of_the_blocks(network, images, monkeypatch):
    x = images()
    clock(monkeypatch, (2.0, 1.0))
    network.tune(x)
    network(x).sum().backward()
    own = [parameter.grad for parameter in network.parameters()]
    plain = in_blocks(network)
    plain.zero_grad()
    plain(x).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(own, plain.parameters(), strict=True))


def test_a_network_in_training_mode_stays_in_it(network, images):
    network.train()
    network.maps["bn1_"].eval()
    modes = [module.training for module in network.modules()]
    network.tune(images())
    assert [module.training for module in network.modules()] == modes


def test_images_of_another_shape_are_refused(network, images):
    with pytest.raises(InputError, match=r"example: found shape \(4, 2, 8, 7\); allowed: \('n', 2, 8, 8\)"):
        network.tune(images()[..., :7])
    with pytest.raises(InputError, match=r"example: found shape \(0, 2, 8, 8\)"):
        network.tune(images()[:0])


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
def test_the_whole_runs_folded_where_that_is_faster(network, images, monkeypatch, apart):
    """In blocks or as an ordinary network, also where nothing is shared and the networks lie side by side."""
    x = images()
    network = side_by_side(network) if apart else network
    before, counted = network(x), built_cost(network, "macs", executed=True)
    count = len(network.tune(x).layers)
    for times, whole in (
        ((9.0, 2.0, 1.0, 3.0, 3.0), "as an ordinary network, channels last"),
        ((9.0, 1.0, 2.0, 3.0, 3.0), "as an ordinary network, contiguous"),
        ((9.0, 3.0, 3.0, 2.0, 1.0), "in blocks, channels last"),
        ((9.0, 3.0, 3.0, 1.0, 2.0), "in blocks, contiguous"),
        ((1.0, 1.0, 1.0, 1.0, 1.0), ""),
    ):
        clock(monkeypatch, *[(1.0, 2.0)] * (1 + count), times)
        found = network.tune(x)
        assert found.whole == whole
        assert (network.instead is not None) == bool(whole)
        torch.testing.assert_close(network(x), before)
        assert (built_cost(network, "macs", executed=True) > counted) == ("ordinary" in whole)
        table = network.report()
        assert (table["executed"] > 0).all()
        assert bool((table["executed"] > table["counted"] + 0.001).any()) == ("ordinary" in whole)
        for task in [own.name for own in network.tasks] if network.labels == "separate" else []:
            torch.testing.assert_close(network(x, task), before.split(3, 1)[int(task)])


@torch.no_grad()
@pytest.mark.parametrize("times", [(9.0, 1.0, 2.0, 2.0, 2.0), (9.0, 2.0, 2.0, 1.0, 2.0)])
def test_a_folded_network_follows_weights_and_modes(network, images, monkeypatch, times):
    x = images()
    clock(monkeypatch, *[(1.0, 2.0)] * (1 + len(network.tune(x).layers)), times)
    network.tune(x)
    assert network.instead is not None
    keys = network.state_dict().keys()
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()})
    torch.testing.assert_close(network(x), in_blocks(network)(x))
    assert copy.deepcopy(network).instead is None
    assert keys == in_blocks(network).state_dict().keys()
    with torch.enable_grad():
        network(x).sum().backward()
    assert all(own.grad is not None for own in network.parameters())
    again = in_blocks(network)
    for own in (network, again):
        own.train()
        own(x)  # moves the running statistics
        own.eval()
    torch.testing.assert_close(network(x), again(x))
    with pytest.raises(InputError, match="input: found n x 2 x 8"):
        network(x[..., 0])


def test_what_has_one_block_a_layer_is_not_tried_in_blocks(network, images, monkeypatch):
    dense = MergedNetwork(network.trace, network.tasks, network.labels, network.shared, dense=True).double()
    for made, forms in ((dense, 2), (network, 4)):
        tried = []

        def fastest(runs, like, tried=tried):
            tried.append(len(runs))
            return [1.0] * len(runs)

        monkeypatch.setattr("stages.core.merged.tuning.fastest", fastest)
        made.tune(images())
        assert tried[-1] == 1 + forms


def test_what_takes_long_is_run_four_times(monkeypatch):
    from stages.core.merged import tuning

    monkeypatch.setattr(tuning, "ENOUGH", 0.0)
    ran = []
    times = tuning.fastest([lambda: ran.append("a"), lambda: ran.append("b")], torch.zeros(1), repeats=10)
    assert ran == ["a", "b"] * 4
    assert len(times) == 2
    assert min(times) >= 0
