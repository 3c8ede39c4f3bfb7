"""Allocation: exact costs, never above the budget, as good as trying everything."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.allocate.model import CostModel, cost_model, even_levels
from stages.allocate.simple import prefix, uniform
from stages.allocate.solve import allocate
from stages.allocate.splits import split_units
from stages.core.graph.source import Source, Task
from stages.core.merged.cost import source_cost, split_cost
from stages.core.networks.architectures import build
from stages.core.recipe.sections import AllocateSection
from stages.core.runtime.errors import InputError
from stages.core.tracing.trace import trace
from stages.core.units.groups import Axis, PermutationGroup, Span

KINDS = ("macs", "parameters")


@pytest.fixture(scope="module")
def source():
    network = build("resnet", {"depth": 8, "width": 8, "channels": 3, "classes": 5})
    return Source(trace(network, torch.zeros(1, 3, 16, 16)), network.state_dict(), Task("a", tuple("01234")))


def draw(model, seed):
    generator = np.random.default_rng(seed)
    return {name: int(generator.integers(0, d + 1)) for name, d in model.sizes.items()}


def shared(model, separate):
    return {name: d - separate[name] for name, d in model.sizes.items()}


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", ["shared", "separate"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_model_counts_what_the_split_costs(source, networks, kind, labels, dense):
    model = cost_model(source.trace, source.state, labels, kind, networks, dense)
    assert model.base == source_cost(source.trace, source.state, labels, kind)
    for seed in range(10):
        separate = draw(model, seed)
        own = shared(model, separate)
        counted = split_cost(source.trace, source.state, labels, kind, own, networks, dense)
        assert model.cost(separate) == counted
        group = next(name for name, d in model.sizes.items() if separate[name] < d)
        more = {**separate, group: separate[group] + 1}
        assert model.step(separate, group) == model.cost(more) - model.cost(separate)


def test_a_group_on_both_sides_of_a_layer_is_counted():
    class Stream(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + torch.relu(self.b(x)))

    network = Stream()
    traced, state = trace(network, torch.zeros(1, 3)), network.state_dict()
    model = cost_model(traced, state, "shared", "macs", 2)
    for s in range(5):
        assert model.cost({"a": s}) == split_cost(traced, state, "shared", "macs", {"a": 4 - s}, 2)
    for s in range(4):
        assert model.step({"a": s}, "a") == model.cost({"a": s + 1}) - model.cost({"a": s})


@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans(), st.sampled_from([1, 2, 3]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_budget_is_kept_and_nothing_more_fits(seed, spent, dense, multiple):
    generator = np.random.default_rng(seed)
    sizes = {name: int(generator.integers(1, 7)) for name in "abc"}
    weights = {pair: int(generator.integers(1, 50)) for pair in (("a", "b"), ("b", "c"))}
    linear = dict.fromkeys(sizes, 0)
    base = 0
    for (i, o), w in weights.items():
        base += w * sizes[i] * sizes[o]
        linear[i] += w * sizes[o]
        linear[o] += w * sizes[i]
    levels = {
        n: [s for s in range(d + 1) if s in (0, d) or (d + s) % multiple == 0] for n, d in sizes.items()
    }
    products = {pair: -w if dense else w for pair, w in weights.items()}
    model = CostModel(sizes, base, linear, products, levels=levels if multiple > 1 else {})
    benefits = {name: generator.random(d) for name, d in sizes.items()}
    budget = 1 + round(spent * (model.whole / base - 1), 6)
    found = allocate(model, benefits, budget, 2, dense=dense)
    assert found.cost == model.cost(found.separate) <= budget * base
    for name, s in found.separate.items():
        assert s in levels[name]
        for more in levels[name]:
            assert more <= s or model.cost({**found.separate, name: more}) > budget * base
    totals = {name: np.concatenate([[0], np.cumsum(np.sort(b)[::-1])]) for name, b in benefits.items()}
    best = max(
        sum(totals[n][s] for n, s in zip(sizes, chosen, strict=True))
        for chosen in itertools.product(*levels.values())
        if model.cost(dict(zip(sizes, chosen, strict=True))) <= budget * base
    )
    assert found.benefit <= best + 1e-9
    assert found.benefit >= 0.99 * best - 1e-9  # the grid has every level of groups this small
    assert found.bound >= found.benefit


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_exact(source, kind):
    model = cost_model(source.trace, source.state, "shared", kind, 2)
    benefits = {name: np.ones(d) for name, d in model.sizes.items()}
    assert not any(allocate(model, benefits, 1.0, 2).separate.values())
    assert allocate(model, benefits, 2.0, 2).separate == model.sizes
    if kind == "macs":
        assert allocate(model, benefits, 2.0, 2).cost == 2 * model.base


def test_a_larger_budget_is_never_worse(source):
    model = cost_model(source.trace, source.state, "shared", "macs", 2)
    generator = np.random.default_rng(0)
    benefits = {name: generator.random(d) for name, d in model.sizes.items()}
    reached = [
        allocate(model, benefits, budget, 2).benefit for budget in (1.0, 1.1, 1.2, 1.46, 1.71, 1.9, 2.0)
    ]
    assert reached == sorted(reached)


def test_the_most_beneficial_units_are_separated(source):
    generator = torch.Generator().manual_seed(0)
    benefits = {
        name: torch.rand(g.size, generator=generator).double() for name, g in source.trace.spec.free.items()
    }
    splits, found, base = split_units(source, benefits, 1.46, 2, "shared", AllocateSection())
    assert 1.44 < found.cost / base <= 1.46
    for name, split in splits.items():
        assert sorted([*split.shared, *split.separate]) == list(range(split.size))
        if split.shared and split.separate:
            assert benefits[name][list(split.separate)].min() >= benefits[name][list(split.shared)].max()


@pytest.mark.parametrize("budget", [0.5, 2.1])
def test_a_budget_out_of_range_is_refused(source, budget):
    model = cost_model(source.trace, source.state, "shared", "macs", 2)
    with pytest.raises(InputError, match="allowed: a number from 1 to 2"):
        allocate(model, {name: np.ones(d) for name, d in model.sizes.items()}, budget, 2)


def test_uniform_is_the_largest_fraction_that_fits(source):
    model = cost_model(source.trace, source.state, "shared", "macs", 2)
    for budget in (1.0, 1.1, 1.46, 1.9, 2.0):
        limit = int(budget * model.base)
        found = uniform(model, limit)
        assert model.cost(found) <= limit
        fractions = sorted({s / d for d in model.sizes.values() for s in range(d + 1)})
        fits = [
            r
            for r in fractions
            if model.cost({g: int(r * d + 1e-9) for g, d in model.sizes.items()}) <= limit
        ]
        assert found == {g: int(fits[-1] * d + 1e-9) for g, d in model.sizes.items()}


def test_prefix_merges_the_first_groups(source):
    model = cost_model(source.trace, source.state, "shared", "macs", 2)
    for budget in (1.0, 1.1, 1.46, 1.9, 2.0):
        limit = int(budget * model.base)
        found = prefix(model, limit)
        assert model.cost(found) <= limit
        whole = [found[g] == d for g, d in model.sizes.items()]
        partial = [g for g, d in model.sizes.items() if 0 < found[g] < d]
        assert whole == sorted(whole)  # once separate, separate to the end
        assert len(partial) <= 1
        if budget < 2:
            border = next(g for g in reversed(list(model.sizes)) if found[g] < model.sizes[g])
            assert model.cost(found) + model.step(found, border) > limit  # the budget is used


@pytest.mark.parametrize("by", ["uniform", "prefix", "threshold"])
@pytest.mark.parametrize("networks", [2, 3])
def test_every_way_of_spending_keeps_the_ends(source, by, networks):
    generator = np.random.default_rng(0)
    model = cost_model(source.trace, source.state, "shared", "macs", networks)
    benefits = {g: generator.random(d) for g, d in model.sizes.items()}
    assert set(allocate(model, benefits, 1.0, networks, by=by).separate.values()) == {0}
    assert allocate(model, benefits, float(networks), networks, by=by).separate == dict(model.sizes)
    middle = allocate(model, benefits, 1.3, networks, by=by)
    assert model.base < middle.cost <= 1.3 * model.base
    assert middle.bound is None


@pytest.fixture
def benefits(source):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(g.size, generator=generator).double() for n, g in source.trace.spec.free.items()}


def test_an_allocation_above_the_budget_is_a_fault_of_ours(source, benefits, monkeypatch):
    monkeypatch.setattr(
        "stages.allocate.solve._fill", lambda model, totals, separate, limit: dict(model.sizes)
    )
    with pytest.raises(AssertionError, match=r"allocation costs \d+, the budget is \d+"):
        split_units(source, benefits, 1.2, 2, "shared", AllocateSection())


def test_a_split_that_costs_something_else_is_a_fault_of_ours(source, benefits, monkeypatch):
    monkeypatch.setattr("stages.allocate.splits.split_cost", lambda *arguments: 7)
    with pytest.raises(AssertionError, match=r"allocation says \d+ macs, the split has 7"):
        split_units(source, benefits, 1.2, 2, "shared", AllocateSection())


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("by", ["measured", "uniform", "prefix", "threshold"])
@pytest.mark.parametrize("layout", ["blocks", "dense"])
def test_merged_widths_are_multiples_within_the_budget(source, benefits, networks, by, layout):
    chosen = AllocateSection(by=by, layout=layout, multiple=8)
    splits, found, base = split_units(source, benefits, 1.5, networks, "shared", chosen)
    assert base < found.cost <= 1.5 * base
    for split in splits.values():
        assert split.width(networks) % 8 == 0 or not split.shared or not split.separate
    exact = split_units(source, benefits, 1.5, networks, "shared", AllocateSection(by=by, layout=layout))[0]
    other = any(split.width(networks) % 8 for split in exact.values() if split.shared and split.separate)
    assert other or networks == 3  # widths of three are multiples here anyhow


def test_units_of_several_entries_are_multiples_sooner():
    """Two heads of four channels; eight hidden units."""
    spans = {"heads": tuple(Span(Axis("q", 0), 0, 4) for _ in range(2)), "hidden": (Span(Axis("w", 0)),)}
    groups = {name: PermutationGroup(name, 8, own) for name, own in spans.items()}
    assert even_levels(groups["heads"], 2, 8) == [0, 2, 4, 6, 8]
    assert even_levels(groups["hidden"], 2, 8) == [0, 8]
    assert even_levels(groups["hidden"], 3, 4) == [0, 2, 4, 6, 8]
    assert even_levels(groups["hidden"], 2, 1) == list(range(9))


@pytest.mark.parametrize("networks", [2, 3])
def test_a_dense_network_has_budgets_up_to_the_square(source, networks):
    model = cost_model(source.trace, source.state, "shared", "macs", networks, dense=True)
    benefits = {name: np.ones(d) for name, d in model.sizes.items()}
    assert networks * model.base < model.whole < networks**2 * model.base
    for budget in (1.0, 1.5, float(networks), networks**2 - 0.5, float(networks**2)):
        found = allocate(model, benefits, budget, networks, dense=True)
        assert model.base <= found.cost <= budget * model.base
    assert found.separate == model.sizes
    assert allocate(model, benefits, float(networks), networks, dense=True).separate != model.sizes
    with pytest.raises(
        InputError, match=rf"budget: found {networks**2}.1; allowed: a number from 1 to {networks**2}"
    ):
        allocate(model, benefits, networks**2 + 0.1, networks, dense=True)
