"""Frank-Wolfe over the maps of all networks to one universe, against automatic differentiation and fine grids."""

import itertools

import pytest
import torch
from torch import nn

from stages.core.networks.architectures import build
from stages.core.tracing.trace import trace
from stages.match.universe import Universe, match_universe

X = torch.zeros(1, 3, 8, 8)


def resnet(randomise, seed):
    return randomise(build("resnet", {"depth": 8, "width": 4, "classes": 4}), seed)


def mlp(randomise, seed):
    layers = [nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)]
    return randomise(nn.Sequential(*layers), seed)


KINDS = {"resnet": resnet, "mlp": mlp}


def problem(kind, randomise, networks=3):
    made = [KINDS[kind](randomise, m) for m in range(networks)]
    spec = trace(made[0], X.to(next(made[0].parameters()))).spec
    return spec, [network.state_dict() for network in made]


def soft(spec, networks, seed=0):
    """Random doubly stochastic maps: means of permutations."""
    generator, maps = torch.Generator().manual_seed(seed), {}
    for name, group in spec.free.items():
        eye = torch.eye(group.size, dtype=torch.float64)
        drawn = [
            [eye[torch.randperm(group.size, generator=generator)] for _ in range(3)] for _ in range(networks)
        ]
        maps[name] = torch.stack([sum(own) / 3 for own in drawn])
    return maps


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_sum_over_pairs(kind, randomise):
    spec, states = problem(kind, randomise)
    universe, maps = Universe(spec, states), soft(spec, 3)
    expected = 0.0
    for a, b in itertools.combinations(range(3), 2):
        for parameter in universe.on:
            expected += float((universe.seen(maps, parameter, a) * universe.seen(maps, parameter, b)).sum())
    assert universe.objective(maps) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_objective(kind, randomise):
    spec, states = problem(kind, randomise)
    universe, maps = Universe(spec, states), soft(spec, 3)
    found = universe.gradient(maps)
    for name in maps:
        for index in [(0, 0, 1), (1, 2, 0), (2, 3, 3)]:
            ends = []
            for step in (1e-5, -1e-5):
                moved = {**maps, name: maps[name].clone()}
                moved[name][index] += step
                ends.append(universe.objective(moved))
            assert float(found[name][index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_search_finds_the_best_point(kind, randomise):
    spec, states = problem(kind, randomise)
    universe = Universe(spec, states)
    for seed in range(3):
        a, b = soft(spec, 3, seed), soft(spec, 3, seed + 10)
        _, found = universe.search(a, b, universe.objective(a))
        grid = [
            universe.objective({name: torch.lerp(own, b[name], float(t)) for name, own in a.items()})
            for t in torch.linspace(0, 1, 51)
        ]
        assert found >= max(grid) - 1e-9 * abs(max(grid))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("networks", [2, 4])
def test_no_step_lowers_the_objective_and_cycles_are_the_identity(kind, networks, randomise):
    spec, states = problem(kind, randomise, networks)
    units, objectives = match_universe(spec, states, torch.Generator().manual_seed(0))
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(objectives))
    assert objectives[-1] > objectives[0]
    for own in units.values():
        assert torch.equal(own[0], torch.arange(own.shape[1]))
        there = [
            own[(m + 1) % networks][own[m].argsort()] for m in range(networks)
        ]  # units of m -> of the next
        around = torch.arange(own.shape[1])
        for step in there:
            around = step[around]
        assert torch.equal(around, torch.arange(own.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("networks", [2, 3])
def test_permuted_copies_are_recovered(kind, networks, randomise, copies):
    original = KINDS[kind](randomise, 0)
    made, matching = copies(original, X.to(next(original.parameters())), networks, 0)
    spec = trace(made[0], X.to(next(made[0].parameters()))).spec
    units, _ = match_universe(spec, [n.state_dict() for n in made], torch.Generator().manual_seed(0))
    assert all(torch.equal(rows, matching.units[name]) for name, rows in units.items())
