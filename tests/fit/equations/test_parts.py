"""Parts that do not touch, against the normal equations of each alone."""

import pytest
import torch

from stages.core.runtime.errors import InputError
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.parts import PartEquations
from stages.fit.equations.solve import solve

PARTS, A, B = 3, 4, 2


def rows(dtype=torch.float64):
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    z, y = draw(40, PARTS * A) + 2, draw(40, PARTS * B) - 1
    return z.to(dtype), y.to(dtype), draw(PARTS, B, A).double()


def accumulate(equations, z, y):
    for own_z, own_y, weight in zip(z.tensor_split(3), y.tensor_split(3), (0.5, 1.0, 3.0), strict=True):
        equations.add(own_z, own_y, weight)
    return equations


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_part_is_a_problem_of_its_own(intercept, ridge, dtype):
    z, y, start = rows(dtype)
    systems = accumulate(PartEquations(PARTS, intercept), z, y).systems()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for part, system in enumerate(systems):
        own_z, own_y = z[:, part * A : (part + 1) * A], y[:, part * B : (part + 1) * B]
        alone = accumulate(NormalEquations(A, B, intercept, z.device), own_z, own_y)
        expected = solve(alone.block(torch.arange(B), torch.arange(A)), start[part], ridge)
        found = solve(system, start[part], ridge)
        for what in ("weight", "bias", "residual", "energy", "moments"):
            one, other = getattr(found, what), getattr(expected, what)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_values_that_are_no_numbers_and_no_rows_are_refused_with_the_layer():
    z, y, _ = rows()
    z[13, 2] = float("nan")
    with pytest.raises(InputError, match="dw: its inputs or targets hold NaN or infinite values"):
        accumulate(PartEquations(PARTS, True, "dw"), z, y).systems()
    with pytest.raises(InputError, match="dw: no rows to fit it to"):
        PartEquations(PARTS, True, "dw").systems()
