"""Allocation of large networks by minimum cuts: quick, within the budget, near the best, under a true bound."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.allocate import solve
from stages.allocate.cut import Cuts, lift
from stages.allocate.model import CostModel
from stages.allocate.solve import allocate


def model_of(sizes, weights, networks=2, dense=False):
    linear, base, more = dict.fromkeys(sizes, 0), 0, networks - 1
    for (i, o), w in weights.items():
        base += w * sizes[i] * sizes[o]
        linear[i] += more * w * sizes[o]
        linear[o] += more * w * sizes[i]
    saved = -(more**2) if dense else more
    return CostModel(sizes, base, linear, {pair: saved * w for pair, w in weights.items()})


def densenet(groups, seed=0, blocks=4, dense=False):
    """DenseNet: every bottleneck reads the growth of all layers before it in its block."""
    sizes, weights = {}, {}
    for block, layer in itertools.product(range(blocks), range(groups // (2 * blocks))):
        wide, growth = f"{block}.{layer}.wide", f"{block}.{layer}.growth"
        sizes |= {wide: 64, growth: 32}
        weights |= {(f"{block}.{before}.growth", wide): 4 ** (blocks - block) for before in range(layer)}
        weights[wide, growth] = 9 * 4 ** (blocks - block)
    generator = np.random.default_rng(seed)
    benefits = {g: generator.random(d) * generator.random() for g, d in sizes.items()}
    return model_of(sizes, weights, dense=dense), benefits


def resnet(stages=4, blocks=18, seed=0, dense=False):
    """Residual streams with two layers inside each block; a layer between streams where they widen."""
    sizes, weights = {}, {}
    for stage in range(stages):
        stream = f"{stage}"
        sizes[stream] = 32 * 2**stage
        if stage:
            weights[f"{stage - 1}", stream] = 1
        for block in range(blocks):
            inner = f"{stage}.{block}"
            sizes[inner] = 32 * 2**stage
            weights |= {(stream, inner): 9, (inner, stream): 9}
    generator = np.random.default_rng(seed)
    benefits = {g: generator.random(d) * generator.random() for g, d in sizes.items()}
    return model_of(sizes, weights, dense=dense), benefits


def draw(seed, networks, dense=False):
    generator = np.random.default_rng(seed)
    sizes = {name: int(generator.integers(1, 7)) for name in "abcd"}
    weights = {
        pair: int(generator.integers(1, 50)) for pair in [*itertools.pairwise("abcd"), ("a", "c"), ("b", "b")]
    }
    return model_of(sizes, weights, networks, dense), {name: generator.random(d) for name, d in sizes.items()}


def totals_of(benefits):
    return {g: np.concatenate([[0.0], np.cumsum(np.sort(b)[::-1])]) for g, b in benefits.items()}


def every(model, totals):
    """Benefit and cost of every split there is."""
    for chosen in itertools.product(*(range(d + 1) for d in model.sizes.values())):
        split = dict(zip(model.sizes, chosen, strict=True))
        yield split, sum(totals[g][s] for g, s in split.items()), model.cost(split)


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(solve, "LARGEST", 0)


@pytest.mark.parametrize(
    ("make", "dense", "budget"),
    [
        *((make, dense, budget) for make in (densenet, resnet) for dense in (False, True) for budget in (1.05, 1.46)),
        (densenet, False, 1.8), (resnet, True, 2.9),
    ],
)  # fmt: skip
def test_many_groups_take_seconds(make, dense, budget):
    model, benefits = make(200, dense=dense) if make is densenet else make(dense=dense)
    start = time.process_time()
    found = allocate(model, benefits, budget, 2, dense=dense)
    assert time.process_time() - start < 10
    assert len(model.sizes) > 70
    assert (budget - 0.001) * model.base < found.cost <= budget * model.base
    assert 0.99 * found.bound <= found.benefit <= found.bound


def test_the_ends_of_two_hundred_groups_are_exact():
    model, benefits = densenet(200)
    shared, separate = allocate(model, benefits, 1.0, 2), allocate(model, benefits, 2.0, 2)
    assert set(shared.separate.values()) == {0}
    assert (separate.separate, separate.cost) == (model.sizes, 2 * model.base)


@given(
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.sampled_from([2, 3]),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_against_every_split(seed, spent, networks, levels, dense):
    model, benefits = draw(seed, networks, dense)
    budget = 1 + round(spent * (model.whole / model.base - 1), 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "LARGEST", 0)
        found = allocate(model, benefits, budget, networks, levels, dense=dense)
    limit = budget * model.base
    best = max(benefit for _, benefit, cost in every(model, totals_of(benefits)) if cost <= limit)
    assert found.cost == model.cost(found.separate) <= limit
    assert found.benefit <= best + 1e-9
    assert found.bound >= best - 1e-9  # true for every split, on the grid or not
    for g, s in found.separate.items():
        assert s == model.sizes[g] or model.cost({**found.separate, g: s + 1}) > limit


@given(st.integers(0, 10_000), st.floats(0, 10))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_cut_is_the_best_split_at_its_price(seed, price):
    model, benefits = draw(seed, 2)
    totals = totals_of(benefits)
    cuts = Cuts(model, totals, {g: list(range(d + 1)) for g, d in model.sizes.items()})
    split, value = cuts.best(price)
    values = [benefit - price * (cost / model.base - 1) for _, benefit, cost in every(model, totals)]
    reached = sum(totals[g][s] for g, s in split.items()) - price * (model.cost(split) / model.base - 1)
    assert reached == pytest.approx(max(values), abs=1e-6)
    assert max(values) - 1e-12 <= value <= max(values) + 1e-5  # rounded up on each arc


@pytest.mark.parametrize("budget", [1.2, 1.46, 1.8])
def test_cuts_gain_what_the_integer_program_gains(budget, monkeypatch):
    model, benefits = densenet(24, seed=1)
    program = allocate(model, benefits, budget, 2)
    monkeypatch.setattr(solve, "LARGEST", 0)
    assert allocate(model, benefits, budget, 2).benefit >= 0.998 * program.benefit


def test_units_of_no_benefit_still_use_the_budget(large):
    model, benefits = draw(0, 2)
    found = allocate(model, {g: np.zeros_like(b) for g, b in benefits.items()}, 1.5, 2)
    assert model.base < found.cost <= 1.5 * model.base
    assert found.benefit == 0 <= found.bound < 1e-6


def test_lifted_benefits_are_nowhere_below():
    totals = np.concatenate([[0.0], np.cumsum(np.sort(np.random.default_rng(0).random(40))[::-1])])
    grid = [0, 1, 9, 30, 40]
    raised = np.interp(np.arange(41), grid, lift(totals, grid)[grid])
    assert (raised >= totals - 1e-12).all()
    assert lift(totals, list(range(41))) == pytest.approx(totals)
