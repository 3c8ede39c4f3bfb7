"""Partial Fusion: the cheapest plans with a sink against trying all of them, and one threshold over all groups."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from stages import merge
from stages.allocate.model import cost_model
from stages.allocate.splits import split_units
from stages.core.align.solve import make_alignment, problem_of
from stages.core.align.ways.partial import leave_sink
from stages.core.align.ways.transport import unit_cost
from stages.core.recipe.known import known_methods
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.sections import AllocateSection
from stages.core.sweep.batches import images_to_batches
from stages.core.units.matching import full_split, identity_matching
from stages.core.units.moments import pool
from stages.match.matching import make_matching
from stages.statistics.moments import gather

BUDGETS = (1.0, 1.1, 1.3, 1.5, 1.8, 1.95, 2.0)
KNOWN = known_methods().match["partial_fusion"]


def assigned(cost):
    """The cheapest way to pair all rows with all columns."""
    return cost[linear_sum_assignment(cost)].sum()


def cheapest(cost, r):
    """Of any r rows with any r columns, by trying all."""
    sets = [np.array(own, dtype=int) for own in itertools.combinations(range(len(cost)), r)]
    return min(assigned(cost[np.ix_(rows, columns)]) for rows in sets for columns in sets)


@given(k=st.integers(1, 5), seed=st.integers(0, 10_000), coarse=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_first_to_leave_the_sink_are_the_cheapest_pairs_there_are(k, seed, coarse):
    cost = np.random.default_rng(seed).random((k, k))
    cost = np.round(3 * cost) / 3 if coarse else cost  # with ties
    columns, price = leave_sink(cost)
    assert sorted(columns) == list(range(k))
    order = np.argsort(price, kind="stable")
    for r in range(k + 1):
        rows = order[:r]
        best = cheapest(cost, r)
        assert assigned(cost[np.ix_(rows, columns[rows])]) == pytest.approx(best)
        assert price[rows].sum() == pytest.approx(best)


@pytest.mark.parametrize("price", [0.05, 0.2, 0.5, 2.0])
def test_what_has_left_the_sink_is_the_plan_of_least_cost_with_it(price):
    cost = np.random.default_rng(0).random((30, 30))
    out = leave_sink(cost)[1] <= price
    plan = np.minimum(cost, price)  # all that is paired at the sink's price is in the sink
    assert leave_sink(cost)[1][out].sum() + price * (~out).sum() == pytest.approx(assigned(plan))


class Case:
    def __init__(self, sources, tasks, way=KNOWN):
        self.sources, self.way = sources, way
        gathered = gather(sources, images_to_batches(tasks, 16), precision=torch.float64)
        self.statistics = pool(gathered, len(sources), len(sources))
        generator = torch.Generator().manual_seed(0)
        self.matching, self.prices = make_matching(sources, way, self.statistics, generator)

    def split(self, budget, **chosen):
        section = AllocateSection(**chosen).spent(self.way.allocate)
        return split_units(self.sources[0], self.prices, budget, len(self.sources), "shared", section)


@pytest.fixture
def case(small, images, sources, calibrate):
    def make(networks=2, way=KNOWN):
        tasks = [images(64, m) for m in range(networks)]
        own = [calibrate(small(m), x) for m, x in enumerate(tasks)]
        return Case(sources(own, tasks[0]), tasks, way)

    return make


@pytest.mark.parametrize("networks", [2, 3])
def test_one_threshold_for_all_groups_as_low_as_the_budget_affords(networks, case):
    found = case(networks)
    sizes = {g: own.size for g, own in found.sources[0].trace.spec.free.items()}
    model = cost_model(found.sources[0].trace, found.sources[0].state, "shared", "macs", networks)
    every = torch.cat(list(found.prices.values()))
    counts = []
    for budget in (*BUDGETS[:-1], float(networks)):
        splits, allocation, base = found.split(budget)
        assert allocation.cost <= budget * base
        counts.append(sum(len(split.separate) for split in splits.values()))
        inside = [found.prices[g][list(s.shared)] for g, s in splits.items()]
        outside = [found.prices[g][list(s.separate)] for g, s in splits.items()]
        inside, outside = torch.cat(inside), torch.cat(outside)
        if not len(outside) or not len(inside):
            continue
        threshold = inside.max()
        assert outside.min() > threshold
        lower = every[every < threshold]
        next_one = lower.max() if len(lower) else -1.0
        more = {g: int((own > next_one).sum()) for g, own in found.prices.items()}
        assert model.cost(more) > budget * base  # the next lower one does not fit
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == sum(sizes.values())
    assert len(set(counts)) > 3


@pytest.mark.parametrize("features", ["activations", "weights"])
def test_what_is_shared_is_paired_at_the_least_cost(features, case):
    found = case(way=MatchSettings(by="partial", features=features, allocate="threshold"))
    spec = found.sources[0].trace.spec
    position = identity_matching(spec, 2)
    problem = problem_of(found.sources, found.statistics, position, full_split(spec))
    splits, _, _ = found.split(1.4)
    whole = make_alignment(
        found.way, found.sources, lambda: found.statistics, found.matching, found.split(1.0)[0]
    )
    made = make_alignment(found.way, found.sources, lambda: found.statistics, found.matching, splits)
    for name, group in made.groups.items():
        assert set(group.views[1].unique().tolist()) <= {0.0, 1.0}  # a permutation
        if features == "activations":
            cost = unit_cost(problem, whole, name, 1, found.way).numpy()
            shared = list(splits[name].shared)
            own = found.matching.units[name][1][shared]
            pairs = group.views[1].argmax(1)
            total = cost[shared, own[pairs]].sum() / cost.mean()
            assert total == pytest.approx(float(found.prices[name][shared].sum()))


def test_a_notebook_spends_the_budget_by_the_threshold(small, images):
    networks = {name: small(seed) for seed, name in enumerate("ab")}
    batches = {name: images(32, seed) for seed, name in enumerate("ab")}
    merged = merge(networks, batches, 1.4, "partial_fusion", progress=False)
    found = merge(networks, batches, 1.4, {**known("partial_fusion"), "match": "ot_fusion"}, progress=False)
    assert merged.about["budget"]["reached"] <= 1.4
    assert merged.shared != found.shared
    assert torch.isfinite(merged(images(3))).all()


def known(name):
    return known_methods().methods[name].model_dump(exclude_unset=True)
