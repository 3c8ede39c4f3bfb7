import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.runtime.errors import InputError
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.solve import solve


def problem(rows, d_in, d_out, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    z = z @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) + 2
    y = z @ torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)
    y = y + torch.randn(rows, d_out, generator=generator, dtype=torch.float64) - 3
    start = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return z.to(dtype), y.to(dtype), start.to(dtype)


def accumulate(z, y, intercept, weights=None, batches=4, name=""):
    equations = NormalEquations(z.shape[1], y.shape[1], intercept, z.device, name)
    parts = zip(z.tensor_split(batches), y.tensor_split(batches), strict=True)
    for (z_part, y_part), weight in zip(parts, weights or [1.0] * batches, strict=True):
        equations.add(z_part, y_part, weight)
    return equations


def every(tensor):
    return torch.arange(tensor.shape[1])


def row_weights(count, weights):
    sizes = torch.tensor([len(part) for part in torch.arange(count).tensor_split(len(weights))])
    return torch.tensor(weights, dtype=torch.float64).repeat_interleave(sizes)


def by_lstsq(z, y, start, ridge, intercept, w=None):
    """The same problem as rows under rows: the data, then the ridge."""
    w = torch.ones(len(z), dtype=torch.float64) if w is None else w
    one = torch.ones(len(z), 1, dtype=torch.float64) * (1.0 if intercept else 0.0)
    middle = (w[:, None] * z).sum(0) / w.sum() if intercept else 0.0
    penalty = ridge * (w[:, None] * (z - middle).square()).sum(0).mean()
    d = z.shape[1]
    design = torch.cat([torch.cat([z, one], 1) * w.sqrt()[:, None],
                        torch.cat([torch.eye(d), torch.zeros(d, 1)], 1).double() * penalty.sqrt()])  # fmt: skip
    target = torch.cat([y * w.sqrt()[:, None], start.T * penalty.sqrt()])
    solution = torch.linalg.lstsq(design, target, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


@given(
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    ridge=st.sampled_from([0.0, 1e-3, 1.0]),
    intercept=st.booleans(),
    weights=st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=4, max_size=4),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_solution_is_that_of_lstsq(sizes, ridge, intercept, weights, seed):
    z, y, start = problem(60, *sizes, seed)
    w = row_weights(60, weights)
    solution = solve(accumulate(z, y, intercept, weights).block(every(y), every(z)), start, ridge)
    weight, bias = by_lstsq(z, y, start, ridge, intercept, w)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solution.bias, bias, rtol=1e-7, atol=1e-7)
    left = (w[:, None] * (z @ weight.T + bias - y).square()).sum(0)
    middle = (w[:, None] * y).sum(0) / w.sum() if intercept else 0.0
    energy = (w[:, None] * (y - middle).square()).sum(0)
    torch.testing.assert_close(solution.residual, left, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solution.energy, energy, rtol=1e-9, atol=1e-9)


@given(data=st.data(), intercept=st.booleans(), ridge=st.sampled_from([0.0, 1e-2]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_block_is_solved_from_the_inputs_it_may_see(data, intercept, ridge):
    z, y, start = problem(50, 7, 5)
    columns = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 6), min_size=1))))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 4), min_size=1))))
    start = start[rows][:, columns]
    solution = solve(accumulate(z, y, intercept).block(rows, columns), start, ridge)
    weight, bias = by_lstsq(z[:, columns], y[:, rows], start, ridge, intercept)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solution.bias, bias, rtol=1e-7, atol=1e-7)


@given(rank=st.integers(0, 5), intercept=st.booleans(), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None, derandomize=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_data_does_not_determine_stays_at_the_start(dtype, rank, intercept, seed):
    z, y, start = problem(40, 6, 3, seed)
    mix = torch.randn(40, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = (mix @ z[:rank]).to(dtype)
    solution = solve(accumulate(z, y.to(dtype), intercept).block(every(y), every(z)), start.to(dtype), 0.0)
    z, y, start = z.double(), y.to(dtype).double(), start.to(dtype).double()
    if intercept:
        z, y = z - z.mean(0), y - y.mean(0)
    tolerance = {"rcond": 1e-5} if dtype == torch.float32 else {"rcond": 1e-10}
    change = torch.linalg.lstsq(z, y - z @ start.T, driver="gelsd", **tolerance).solution.T
    close = 1e-2 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(solution.weight, start + change, rtol=close, atol=close)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("intercept", [False, True])
def test_inputs_that_are_always_zero_keep_their_start(ridge, intercept):
    z, y, start = problem(50, 6, 3)
    z[:, [1, 4]] = 0.0
    solution = solve(accumulate(z, y, intercept).block(every(y), every(z)), start, ridge)
    torch.testing.assert_close(solution.weight[:, [1, 4]], start[:, [1, 4]], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(solution.weight).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("intercept", [False, True])
def test_inputs_that_are_all_zero_give_the_start_back(ridge, intercept):
    _, y, start = problem(50, 6, 3)
    z = torch.zeros(50, 6).double()
    solution = solve(accumulate(z, y, intercept).block(every(y), every(z)), start, ridge)
    torch.testing.assert_close(solution.weight, start)
    torch.testing.assert_close(solution.bias, y.mean(0) if intercept else torch.zeros(3).double())


def test_a_constant_output_is_left_to_the_intercept():
    z, y, _ = problem(50, 6, 3)
    y[:, 1] = 7.0
    solution = solve(accumulate(z, y, True).block(every(y), every(z)), torch.zeros(3, 6).double(), 0.0)
    torch.testing.assert_close(solution.weight[1], torch.zeros(6).double(), rtol=0, atol=1e-10)
    assert solution.bias[1] == pytest.approx(7.0)
    assert solution.energy[1] == pytest.approx(0.0, abs=1e-9)
    assert solution.residual[1] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("intercept", [False, True])
def test_a_target_the_start_reaches_keeps_the_start(intercept):
    z, _, start = problem(50, 6, 3)
    y = z @ start.T + (5.0 if intercept else 0.0)
    for ridge in (0.0, 1e-3, 10.0):
        solution = solve(accumulate(z, y, intercept).block(torch.arange(3), every(z)), start, ridge)
        torch.testing.assert_close(solution.weight, start, rtol=1e-9, atol=1e-9)
        assert (solution.residual <= 1e-12 * solution.energy).all()


@given(batches=st.integers(1, 30), intercept=st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_how_rows_are_split_into_batches_does_not_matter(batches, intercept):
    z, y, start = problem(60, 5, 2)
    one = solve(accumulate(z, y, intercept, batches=1).block(every(y), every(z)), start, 1e-3)
    some = solve(accumulate(z, y, intercept, batches=batches).block(every(y), every(z)), start, 1e-3)
    torch.testing.assert_close(some.weight, one.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(some.bias, one.bias, rtol=1e-9, atol=1e-9)


def test_weighting_rows_is_repeating_them():
    z, y, start = problem(40, 5, 2)
    repeated = torch.arange(40).repeat_interleave(torch.tensor([1] * 10 + [2] * 10 + [1] * 10 + [4] * 10))
    weighted = solve(accumulate(z, y, True, [1.0, 2.0, 1.0, 4.0]).block(every(y), every(z)), start, 1e-2)
    plain = solve(
        accumulate(z[repeated], y[repeated], True, batches=1).block(every(y), every(z)), start, 1e-2
    )
    torch.testing.assert_close(weighted.weight, plain.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weighted.residual, plain.residual, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_rows_come_close_to_float64(offset):
    z, y, start = problem(4000, 12, 3)
    z, y = (z / z.std() + offset).float(), y.float()
    solution = solve(
        accumulate(z, y, True, batches=20, weights=[1.0] * 20).block(every(y), every(z)), start, 1e-6
    )
    weight, bias = by_lstsq(z.double(), y.double(), start, 1e-6, True)
    error = (z.double() @ (solution.weight - weight).T + solution.bias - bias).square().mean().sqrt()
    assert error < 1e-4 * y.std()
    reached = (z.double() @ solution.weight.T + solution.bias - y).square().sum(0)
    torch.testing.assert_close(solution.residual, reached, rtol=1e-3, atol=1e-3)


def test_the_moments_of_the_output_are_those_of_the_rows():
    z, y, start = problem(60, 5, 3)
    weights = [0.5, 1.0, 2.0, 1.0]
    columns, w = torch.tensor([0, 2, 3]), row_weights(60, weights)[:, None]
    found = solve(accumulate(z, y, True, weights).block(every(y), columns), start[:, columns], 1e-3)
    mean, variance = found.moments
    out = z[:, columns] @ found.weight.T
    expected = (w * out).sum(0) / w.sum()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(variance, (w * (out - expected).square()).sum(0) / w.sum())


def test_no_rows_are_added_once_a_block_is_solved():
    z, y, _ = problem(40, 5, 2)
    equations = accumulate(z, y, True, name="conv1")
    equations.block(every(y), every(z))
    with pytest.raises(AssertionError, match="conv1: rows are added before"):
        equations.add(z, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("intercept", [False, True])
def test_values_that_are_no_numbers_are_refused_with_the_layer(value, intercept):
    z, y, _ = problem(40, 5, 2)
    z[13, 2] = value
    with pytest.raises(InputError, match="conv1: its inputs or targets hold NaN or infinite values"):
        accumulate(z, y, intercept, name="conv1").block(every(y), every(z))


def test_no_rows_at_all_are_refused_with_the_layer():
    equations = NormalEquations(5, 2, True, torch.device("cpu"), "fc")
    with pytest.raises(InputError, match="fc: no rows to fit it to"):
        equations.block(torch.arange(2), torch.arange(5))


@pytest.mark.parametrize("intercept", [False, True])
def test_the_solution_is_the_same_whatever_is_worked_on_at_a_time(intercept, monkeypatch):
    z, y, start = problem(60, 8, 3)
    columns = torch.tensor([1, 2, 4, 5, 7])
    found = []
    for block in (512, 3):
        monkeypatch.setattr("stages.core.sweep.gram.BLOCK", block)
        found.append(solve(accumulate(z, y, intercept).block(every(y), columns), start[:, columns], 1e-3))
    for name in ("weight", "bias", "residual", "energy", "moments"):
        one, other = (getattr(solution, name) for solution in found)
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
