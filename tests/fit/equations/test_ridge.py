"""The ridge that is chosen by images held out, against plain least squares of the rows themselves."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.graph.nodes import Node
from stages.core.sweep.batches import Batch
from stages.core.sweep.rows import input_rows, output_rows
from stages.fit.equations.apart import RowsApart, SumsApart
from stages.fit.equations.factor import Cholesky
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.nearby import Nearby, reaches
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.ridge import GRID, apart, choose, enough, held_out
from stages.fit.equations.rows import RowEquations
from stages.fit.equations.solve import left_over, solve
from stages.fit.equations.trial import ROUGH, some

D_IN, D_OUT = 6, 3
EVERY = torch.arange(D_OUT), torch.arange(D_IN)
APART = {NormalEquations: SumsApart, RowEquations: RowsApart}


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
    parts = [filled(kind, scale * z, y, 2.0, intercept), filled(kind, scale * held_z, held_y, 0.5, intercept)]
    learnt, held = (own.block(*EVERY) for own in parts)
    start = torch.ones(D_OUT, D_IN).double() / scale
    trial = APART[kind](parts).trial(*EVERY, start)
    for ridge in (*GRID, 1e-9):
        found = solve(learnt, start, ridge)
        expected = left_over(held, found.weight, found.bias)
        rounding = 1e-6 if ridge < trial.single else ROUGH * trial.single / ridge
        assert trial.losses([ridge])[0] == pytest.approx(expected, rel=rounding)
    assert 1e-9 < trial.single < GRID[-1]


def test_a_trial_of_inputs_that_are_zero_leaves_the_start():
    z, (_, y) = torch.zeros(30, D_IN).double(), rows(30)
    parts = [filled(NormalEquations, z, y, 1.0, False) for _ in range(2)]
    trial = SumsApart(parts).trial(*EVERY, torch.ones(D_OUT, D_IN).double())
    assert trial.losses([0.1])[0] == pytest.approx(float(y.square().sum()))


@pytest.mark.parametrize("kind", [NormalEquations, RowEquations])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4, 5], [5, 0, 3], [3, 1, 2, 0, 5, 4]])
def test_a_block_is_solved_alike_before_and_after_a_choice(kind, intercept, columns):
    """What the choice has made of the rows is used again; a trial reads its inputs in any order."""
    (z, y), (held_z, held_y) = rows(30), rows(20, 1)
    made = [
        [filled(kind, z, y, 2.0, intercept), filled(kind, held_z, held_y, 0.5, intercept)] for _ in range(2)
    ]
    tried, plain = map(APART[kind], made)
    outputs, columns = torch.tensor([2, 0]), torch.tensor(columns)
    start = torch.randn(2, len(columns), generator=torch.Generator().manual_seed(3)).double()
    systems = [own.block(outputs, columns) for own in made[0]]
    found = solve(systems[0], start, 0.1)
    trial = tried.trial(outputs, columns, start.clone())
    assert trial.losses([0.1])[0] == pytest.approx(left_over(systems[1], found.weight, found.bias), rel=1e-5)
    one, other = (
        solve(own.block(outputs, columns), start, 0.1) for own in (tried, plain) if own.join() is None
    )
    for what in ("weight", "bias", "residual", "energy"):
        torch.testing.assert_close(getattr(one, what), getattr(other, what))


@pytest.mark.parametrize("count", [1, 4, 5, 23])
def test_batches_are_taken_apart_as_their_images_are(count):
    """At hand and made when asked for; every image once, each batch of one part."""
    images = torch.arange(count).double()[:, None]
    late = Batch(images, 1, torch.arange(count).flip(0))
    for batches in ([Batch(own, 0) for own in images.split(7)], late.split(4)):
        found = apart(batches)
        assert sorted(float(x) for own in found for x in own.images) == sorted(images.flatten().tolist())
        assert all(own.task == batches[0].task for own in found)
        expected = held_out(count) if count >= 5 else torch.zeros(count, dtype=torch.bool)
        whole = torch.cat([own.images for own in batches])
        held = [own.images for own in found if own.held]
        assert torch.equal(torch.cat([whole[:0], *held]), whole[expected])
        assert all(len(own) for own in found)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (32, 32), (33, 17), (512, 32), (1000, 32)])
def test_some_outputs_stand_for_all(count, expected):
    found = some(torch.arange(count))
    assert len(found) == expected
    assert len(found.diff().unique()) <= 1


@given(valley=st.floats(-5, 2), tilt=st.floats(0.1, 10), start=st.sampled_from(GRID))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_lowest_of_a_valley_is_found_with_few_losses(valley, tilt, start):
    seen = []

    def loss(ridge):
        seen.append(ridge)
        away = math.log10(ridge) - valley
        return tilt * away**2 if away < 0 else away**2

    assert choose(each(loss), start) == min(GRID, key=loss)
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


@pytest.mark.parametrize("decay", [0.5, 1.0, 1.5])
def test_a_factor_serves_ridges_near_its_own(decay):
    """Against plain solutions, with spectra as features have them; among the targets one of zeros."""
    generator, d = torch.Generator().manual_seed(0), 600
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    z = draw(1500, d) * torch.arange(1, d + 1).double() ** (-decay / 2) @ torch.linalg.qr(draw(d, d))[0]
    y = z @ draw(d, 5) + draw(1500, 5)
    y[:, 2] = 0
    G, R = z.T @ z, z.T @ y
    scale = G.diagonal().mean()
    G, R = G / scale, R / scale
    near = None
    for ridge in GRID[3:10]:
        exact = torch.linalg.solve(G + ridge * torch.eye(d).double(), R)
        if near is None or not reaches(near.ridge, ridge):
            lower = torch.linalg.cholesky(G + ridge * torch.eye(d).double())
            near = Nearby(Cholesky(lower), ridge, R)
        found = near.solution(ridge)
        off = (found - exact).norm() / exact.norm()
        assert off < (1e-9 if ridge == near.ridge else 0.03)
        losses = [(y - z @ own).square().sum() for own in (found, exact)]
        torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


@pytest.mark.parametrize("rows_of", [False, True])
def test_a_trial_of_many_inputs_leaves_what_the_solution_leaves(rows_of):
    generator, d = torch.Generator().manual_seed(0), 1100
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    count, kind = (540, RowEquations) if rows_of else (2000, NormalEquations)
    parts = []
    mix, W = draw(d, d) * torch.arange(1, d + 1) ** -0.5, draw(d, 3)
    for n in (count, count // 4):
        z = draw(n, d) @ mix.T
        own = RowEquations(n, d, 3, True, z.dtype, z.device) if rows_of else kind(d, 3, True, z.device)
        own.add(z, z @ W + 20 * draw(n, 3))
        parts.append(own)
    start, every = torch.zeros(3, d).double(), (torch.arange(3), torch.arange(d))
    trial = APART[kind](parts).trial(*every, start)
    learnt, held = (own.block(*every) for own in parts)
    for ridge in (GRID[5], GRID[6], GRID[4], GRID[7], GRID[9]):
        assert ridge > trial.single
        found = solve(learnt, start, ridge)
        assert trial.losses([ridge])[0] == pytest.approx(left_over(held, found.weight, found.bias), rel=5e-3)
