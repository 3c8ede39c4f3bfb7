import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.core.graph.source import Task
from stages.core.merged.cost import built_cost, check_built, source_cost, split_cost
from stages.core.merged.network import MergedNetwork
from stages.core.tracing.trace import trace
from stages.core.units.matching import full_split

KINDS = ("macs", "parameters")


def multiply_accumulates(network, x):
    """Counted by torch while the network runs on one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x[:1])
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module")
def build_merged(small, images, splits):
    """(networks, labels, seed, bias) -> the network, what it was built from, and x."""

    def make(networks=2, labels="shared", seed=0, bias=False, dense=False):
        source = small(0, bias=bias)
        traced = trace(source, images())
        chosen = splits(traced.spec, seed)
        shared = {name: len(split.shared) for name, split in chosen.items()}
        tasks = [Task(str(m), ("x", "y", "z")) for m in range(networks)]
        merged = MergedNetwork(traced, tasks, labels, shared, dense=dense)
        return merged.double(), source, traced, shared

    return make


@given(seed=st.integers(0, 1000), networks=st.integers(2, 3), bias=st.booleans(), dense=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_all_counts_agree(build_merged, images, seed, networks, bias, dense):
    merged, source, traced, shared = build_merged(networks, "shared", seed, bias, dense)
    state = source.state_dict()
    runs = multiply_accumulates(merged, images())
    trained = sum(parameter.numel() for parameter in merged.parameters())
    for kind, counted in (("macs", runs), ("parameters", trained)):
        assert built_cost(merged, kind) == counted
        assert split_cost(traced, state, "shared", kind, shared, networks, dense) == counted


def test_a_source_costs_what_running_it_takes(small, images):
    network = small(bias=True)
    traced = trace(network, images())
    macs = source_cost(traced, network.state_dict(), "shared", "macs")
    assert macs == multiply_accumulates(network, images())
    trained = source_cost(traced, network.state_dict(), "shared", "parameters")
    assert trained == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("networks", [2, 3])
def test_sharing_everything_costs_one_network_and_nothing_costs_all(build_merged, networks):
    _, source, traced, _ = build_merged(networks)
    one = source_cost(traced, source.state_dict(), "shared", "macs")
    cost = [
        split_cost(traced, source.state_dict(), "shared", "macs", shared, networks)
        for shared in ({n: g.size for n, g in traced.spec.free.items()}, dict.fromkeys(traced.spec.free, 0))
    ]
    assert cost == [one, networks * one]


@given(d=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_layer_of_two_networks_costs_the_stated_formula(d, data):
    network = nn.Sequential(
        nn.Linear(3, d[0]), nn.ReLU(), nn.Linear(d[0], d[1]), nn.ReLU(), nn.Linear(d[1], 2)
    )
    traced, state = trace(network, torch.zeros(1, 3)), network.state_dict()
    shared = {"0": data.draw(st.integers(0, d[0])), "2": data.draw(st.integers(0, d[1]))}
    r_i, r_o = (1 - k / size for k, size in zip(shared.values(), d, strict=True))
    ends = 3 * d[0] * (1 + r_i) + 2 * d[1] * (1 + r_o)  # the first layer's inputs and the logits are shared
    middle = d[0] * d[1] * ((1 + r_i) * (1 + r_o) - 2 * r_i * r_o)
    assert split_cost(traced, state, "shared", "macs", shared, 2) == pytest.approx(ends + middle)
    middle = d[0] * d[1] * (1 + r_i) * (1 + r_o)
    assert split_cost(traced, state, "shared", "macs", shared, 2, dense=True) == pytest.approx(ends + middle)


@given(seed=st.integers(0, 1000), networks=st.integers(2, 3), kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_separating_one_more_unit_never_costs_less(build_merged, seed, networks, kind, data):
    _, source, traced, shared = build_merged(networks, "shared", seed)
    assume(any(shared.values()))
    group = data.draw(st.sampled_from([name for name, k in shared.items() if k]))
    fewer = {**shared, group: shared[group] - 1}
    before, after = (
        split_cost(traced, source.state_dict(), "shared", kind, s, networks) for s in (shared, fewer)
    )
    assert after >= before


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_separate_label_spaces_are_outside_the_budget(build_merged, kind):
    merged, source, traced, shared = build_merged(3, "separate", 2)
    head = sum(p.numel() for p in merged.map_of(merged.head).parameters())
    body = built_cost(merged, kind)
    assert body == split_cost(traced, source.state_dict(), "separate", kind, shared, 3)
    biases = 9 if kind == "macs" else 0  # three classes a network
    assert built_cost(merged, kind, heads=True) == body + head - biases
    one = source_cost(traced, source.state_dict(), "shared", kind)
    assert source_cost(traced, source.state_dict(), "separate", kind) == one - (18 if kind == "macs" else 21)


def test_a_network_that_costs_something_else_is_refused(build_merged, images):
    merged, source, traced, shared = build_merged(2, "shared", 5)
    promised = split_cost(traced, source.state_dict(), "shared", "macs", shared, 2)
    check_built(merged, "macs", promised)
    full = {name: len(split.shared) for name, split in full_split(traced.spec).items()}
    other = split_cost(traced, source.state_dict(), "shared", "macs", full, 2)
    assert other != promised
    with pytest.raises(AssertionError, match=f"has {promised} macs, allocation said {other}"):
        check_built(merged, "macs", other)
