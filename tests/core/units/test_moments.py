import numpy as np
import pytest
import torch

from stages.core.units.moments import Moments


def similarity(mean, second, networks, kind):
    return Moments(mean, second, (len(mean) // networks,) * networks).between(kind)


@pytest.fixture
def features():
    """Three networks of four units on 50 rows, and their joint moments."""
    rows = torch.randn(50, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    return rows.view(50, 3, 4), rows.mean(0), rows.T @ rows / 50


def pairs():
    return [(m, n, i, j) for m in range(3) for n in range(3) for i in range(4) for j in range(4)]


def test_inner_is_the_mean_product(features):
    rows, mean, second = features
    found = similarity(mean, second, 3, "inner")
    for m, n, i, j in pairs():
        assert found[m, n, i, j] == pytest.approx(float((rows[:, m, i] * rows[:, n, j]).mean()))


def test_distance_is_minus_the_mean_squared_difference(features):
    rows, mean, second = features
    found = similarity(mean, second, 3, "distance")
    for m, n, i, j in pairs():
        expected = -float((rows[:, m, i] - rows[:, n, j]).square().mean())
        assert found[m, n, i, j] == pytest.approx(expected, abs=1e-9)


def test_correlation_is_that_of_numpy(features):
    rows, mean, second = features
    found = similarity(mean, second, 3, "correlation")
    expected = np.corrcoef(rows.flatten(1).numpy(), rowvar=False)
    for m, n, i, j in pairs():
        assert found[m, n, i, j] == pytest.approx(expected[4 * m + i, 4 * n + j])


@pytest.mark.parametrize("value", [0.0, 2.0, 1e6])
def test_a_constant_unit_correlates_with_nothing(features, value):
    rows = features[0].flatten(1).clone()
    rows[:, 5] = value
    found = similarity(rows.mean(0), rows.T @ rows / 50, 3, "correlation")
    assert torch.isfinite(found).all()
    assert (found[1, :, 1] == 0).all()
    assert (found[:, 1, :, 1] == 0).all()
    kept = np.delete(np.arange(12), 5)
    expected = torch.from_numpy(np.corrcoef(rows[:, kept].numpy(), rowvar=False))
    full = found.transpose(1, 2).reshape(12, 12)
    torch.testing.assert_close(full[kept][:, kept], expected)


@pytest.mark.parametrize("kind", ["inner", "distance", "correlation"])
def test_similarity_is_symmetric_and_largest_with_oneself(features, kind):
    _, mean, second = features
    found = similarity(mean, second, 3, kind)
    torch.testing.assert_close(found, found.permute(1, 0, 3, 2))
    if kind != "inner":
        best = 0.0 if kind == "distance" else 1.0
        assert found.max() <= best + 1e-9
        for m in range(3):
            torch.testing.assert_close(found[m, m].diagonal(), torch.full((4,), best).double())


def test_correlation_does_not_see_scale_and_offset(features):
    rows, mean, second = features
    scaled = rows.flatten(1) * torch.linspace(0.1, 30, 12).double() + torch.arange(12)
    other = similarity(scaled.mean(0), scaled.T @ scaled / 50, 3, "correlation")
    torch.testing.assert_close(other, similarity(mean, second, 3, "correlation"))
