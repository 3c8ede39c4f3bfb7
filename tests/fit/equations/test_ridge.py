"""The ridge that is chosen by images held out, against plain least squares of the rows themselves."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.graph.nodes import Node
from stages.core.sweep.rows import input_rows, output_rows
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.ridge import GRID, choose, enough, held_out
from stages.fit.equations.rows import RowEquations
from stages.fit.equations.solve import left_over, solve
from stages.fit.equations.trial import ROUGH, Trial, some

D_IN, D_OUT = 6, 3
EVERY = torch.arange(D_OUT), torch.arange(D_IN)


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(count, D_IN) @ draw(D_IN, D_IN) + 2 * draw(D_IN), draw(count, D_OUT) - 3


def filled(kind, z, y, weight, intercept):
    if kind is RowEquations:
        equations = RowEquations(len(z), D_IN, D_OUT, intercept, z.dtype, z.device)
    else:
        equations = NormalEquations(D_IN, D_OUT, intercept, z.device)
    equations.add(z, y, weight)
    return equations


def each(loss):
    return lambda ridges: [loss(ridge) for ridge in ridges]


@pytest.mark.parametrize("kind", [NormalEquations, RowEquations])
@pytest.mark.parametrize("intercept", [False, True])
def test_rows_that_are_absorbed_count_as_those_that_were_added(kind, intercept):
    (z, y), (more_z, more_y) = rows(30), rows(20, 1)
    whole = filled(NormalEquations, z, y, 2.0, intercept)
    whole.add(more_z, more_y, 0.5)
    joined, other = filled(kind, z, y, 2.0, intercept), filled(kind, more_z, more_y, 0.5, intercept)
    joined.block(*EVERY), other.block(*EVERY)  # as after a choice
    joined.absorb(other)
    start = torch.ones(D_OUT, D_IN, dtype=torch.float64)
    found, expected = (solve(own.block(*EVERY), start, 0.1) for own in (joined, whole))
    for what in ("weight", "bias", "residual", "energy"):
        torch.testing.assert_close(getattr(found, what), getattr(expected, what))
    if intercept:
        torch.testing.assert_close(found.moments, expected.moments)


@pytest.mark.parametrize("intercept", [False, True])
def test_maps_that_are_absorbed_count_as_their_rows(intercept):
    a = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    node, generator = Node("c", "conv2d", ("x",), a), torch.Generator().manual_seed(0)
    z = 1 + torch.randn(20, 4, 5, 5, generator=generator, dtype=torch.float64)
    y = F.conv2d(z, torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64), **a).square()
    maps = [MapEquations(node, (3, 3), (5, 5), intercept) for _ in range(2)]
    expected = NormalEquations(36, 3, intercept, z.device)
    for own, part, weight in zip(maps, (slice(0, 12), slice(12, 20)), (1.0, 0.3), strict=True):
        own.add(z[part], y[part], weight)
        expected.add(input_rows(node, z[part], (3, 3)), output_rows(node, y[part]), weight)
    maps[0].absorb(maps[1])
    every, start = (torch.arange(3), torch.arange(36)), torch.zeros(3, 36, dtype=torch.float64)
    one, other = (solve(own.block(*every), start, 1e-2) for own in (maps[0], expected))
    torch.testing.assert_close(one.weight, other.weight)
    torch.testing.assert_close(one.bias, other.bias)


@pytest.mark.parametrize("kind", [NormalEquations, RowEquations])
@pytest.mark.parametrize("intercept", [False, True])
def test_what_is_left_of_other_rows_is_their_squared_error(kind, intercept):
    (z, y), (held_z, held_y) = rows(30), rows(20, 1)
    found = solve(filled(kind, z, y, 1.0, intercept).block(*EVERY), torch.zeros(D_OUT, D_IN).double(), 0.1)
    expected = 0.5 * (held_z @ found.weight.T + found.bias - held_y).square().sum()
    system = filled(kind, held_z, held_y, 0.5, intercept).block(*EVERY)
    left = left_over(system, found.weight, found.bias)
    assert left == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", [NormalEquations, RowEquations])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_trial_leaves_what_the_solution_leaves(kind, intercept, scale):
    """In single precision, where the ridge is large enough for it, and in double, where it is not."""
    (z, y), (held_z, held_y) = rows(30), rows(20, 1)
    learnt, held = (
        filled(kind, scale * z, y, weight, intercept).block(*EVERY)
        for z, y, weight in ((z, y, 2.0), (held_z, held_y, 0.5))
    )
    start = torch.ones(D_OUT, D_IN).double() / scale
    trial = Trial(learnt, held, start)
    for ridge in (*GRID, 1e-9):
        found = solve(learnt, start, ridge)
        expected = left_over(held, found.weight, found.bias)
        rounding = 1e-6 if ridge < trial.single else ROUGH * trial.single / ridge
        assert trial.loss(ridge) == pytest.approx(expected, rel=rounding)
    assert 1e-9 < trial.single < GRID[-1]


def test_a_trial_of_inputs_that_are_zero_leaves_the_start():
    z, (_, y) = torch.zeros(30, D_IN).double(), rows(30)
    learnt, held = (filled(NormalEquations, z, y, 1.0, False).block(*EVERY) for _ in range(2))
    trial = Trial(learnt, held, torch.ones(D_OUT, D_IN).double())
    assert trial.loss(0.1) == pytest.approx(float(y.square().sum()))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (64, 64), (65, 33), (512, 64), (1000, 63)])
def test_some_outputs_stand_for_all(count, expected):
    found = some(torch.arange(count))
    assert len(found) == expected
    assert len(found.diff().unique()) <= 1


@given(valley=st.floats(-5, 2), tilt=st.floats(0.1, 10))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_lowest_of_a_valley_is_found_with_few_losses(valley, tilt):
    seen = []

    def loss(ridge):
        seen.append(ridge)
        away = math.log10(ridge) - valley
        return tilt * away**2 if away < 0 else away**2

    assert choose(each(loss)) == min(GRID, key=loss)
    assert all(b > a for a, b in pairwise(GRID))
    asked = seen[: -len(GRID)]
    assert len(asked) == len(set(asked)), "no ridge is tried twice"


def test_a_loss_without_slope_takes_the_middle_and_a_nan_is_not_chosen():
    assert choose(each(lambda ridge: 1.0)) == GRID[5]
    assert choose(each(lambda ridge: float("nan") if ridge < 0.01 else -ridge)) == GRID[-1]


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1, 1, 1, 1], [7, 100, 3], [400]])
def test_a_fifth_of_the_images_is_held_out_however_they_are_batched(sizes):
    count = sum(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = torch.cat([held_out(size, start) for size, start in zip(sizes, starts, strict=True)])
    assert torch.equal(found, held_out(count))
    assert found.sum() in (count // 5, -(-count // 5))
    assert enough([count, 5])
    assert not enough([count, 4])
