import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.runtime.errors import InputError
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.rows import RowEquations
from stages.fit.equations.solve import solve


def both(rows, d_in, d_out, intercept, seed, dtype=torch.float64):
    """The same rows as they are and as sums."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    z, y = (draw(rows, d_in) @ draw(d_in, d_in) + 2).to(dtype), (draw(rows, d_out) - 3).to(dtype)
    few = RowEquations(rows + 3, d_in, d_out, intercept, dtype, z.device, "fc")  # room that is not needed
    sums = NormalEquations(d_in, d_out, intercept, z.device)
    for equations in (few, sums):
        for i, part in enumerate(torch.arange(rows).tensor_split(3)):
            equations.add(z[part], y[part], (0.5, 1.0, 3.0)[i])
    return few, sums, draw(d_out, d_in).to(dtype)


@given(
    sizes=st.tuples(st.integers(4, 12), st.integers(1, 30), st.integers(1, 4)),
    ridge=st.sampled_from([1e-3, 1.0]),
    intercept=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_solution_is_that_of_the_normal_equations(sizes, ridge, intercept, data):
    few, sums, start = both(*sizes, intercept, data.draw(st.integers(0, 100)))
    columns = torch.tensor(sorted(data.draw(st.sets(st.integers(0, sizes[1] - 1), min_size=1))))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, sizes[2] - 1), min_size=1))))
    one, other = (solve(e.block(rows, columns), start[rows][:, columns], ridge) for e in (few, sums))
    for name in ("weight", "bias", "residual", "energy", "moments"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("intercept", [False, True])
def test_without_a_ridge_what_the_rows_leave_open_stays_at_the_start(intercept):
    few, sums, start = both(6, 20, 3, intercept, 0)
    every, inputs = torch.arange(3), torch.arange(20)
    one, other = (solve(e.block(every, inputs), start, 0.0) for e in (few, sums))
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-6)
    assert (one.residual < 1e-18 * one.energy).all()


def test_rows_in_single_precision_are_solved_in_double():
    few, _, start = both(40, 300, 5, True, 0, torch.float32)
    found = solve(few.block(torch.arange(5), torch.arange(300)), start, 1e-3)
    exact = RowEquations(40, 300, 5, True, torch.float64, start.device)
    exact.z, exact.y, exact.weights, exact.count = few.z.double(), few.y.double(), few.weights, few.count
    expected = solve(exact.block(torch.arange(5), torch.arange(300)), start.double(), 1e-3)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_with_the_layer(value):
    few, _, _ = both(6, 20, 3, True, 0)
    few.z[2, 4] = value
    with pytest.raises(InputError, match="fc: its inputs or targets hold NaN or infinite values"):
        few.block(torch.arange(3), torch.arange(20))


def test_no_rows_at_all_are_refused_with_the_layer():
    few = RowEquations(4, 20, 3, True, torch.float64, torch.device("cpu"), "fc")
    with pytest.raises(InputError, match="fc: no rows to fit it to"):
        few.block(torch.arange(3), torch.arange(20))
