import pytest
import torch

from stages.fit.equations.factor import Cholesky, Spectrum, factorise_


def symmetric(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    G = basis @ torch.diag(torch.tensor(values).double()) @ basis.T
    return (G + G.T) / 2


def solved(G, penalty, right, name=""):
    return factorise_(G.clone(), penalty, G.clone, name).solve_(right.clone())


@pytest.mark.parametrize("kind", ["definite", "singular", "indefinite by rounding"])
def test_symmetric_systems_of_every_kind_are_solved(kind):
    values = {"definite": [3.0, 2.0, 1.0, 0.5, 0.1], "singular": [3.0, 2.0, 1.0, 0.0, 0.0],
              "indefinite by rounding": [3.0, 2.0, 1.0, 1e-17, -1e-17]}[kind]  # fmt: skip
    G = symmetric(values)
    right = G @ torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for penalty in (0.0, 0.1):
        expected = torch.linalg.pinv(G + penalty * torch.eye(5), rtol=1e-12) @ right
        torch.testing.assert_close(solved(G, penalty, right), expected)


def test_a_failed_factorisation_is_named_and_solved_otherwise(caplog):
    G = torch.diag(torch.tensor([1.0, -1e-3]).double())
    with caplog.at_level("INFO"):
        for _ in range(2):
            found = solved(G, 1e-6, torch.ones(2, 1).double(), "layer3.conv1")
    assert caplog.text.count("layer3.conv1: its inputs depend on each other; solved by eigenvalues") == 1
    torch.testing.assert_close(found, torch.tensor([[1 / (1 + 1e-6)], [0.0]]).double())


def test_one_factor_solves_as_often_as_it_is_asked_in_the_place_of_the_matrix():
    G = symmetric([3.0, 2.0, 1.0, 0.5, 0.1])
    own = G.clone()
    factor = factorise_(own, 0.1, G.clone)
    assert isinstance(factor, Cholesky)
    assert factor.lower.data_ptr() == own.data_ptr()
    for seed in (2, 3):
        right = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        into = right.clone()
        found = factor.solve_(into)
        assert found.data_ptr() == into.data_ptr()
        torch.testing.assert_close(G @ found + 0.1 * found, right)


def test_without_a_penalty_no_cholesky_is_tried():
    G = symmetric([3.0, 2.0, 1.0, 0.5, 0.1])
    assert isinstance(factorise_(G.clone(), 0.0, G.clone), Spectrum)


def test_rounding_errors_in_the_matrix_say_what_is_cut_off():
    G = torch.diag(torch.tensor([1.0, 1e-8]).double())
    right = torch.tensor([[1.0], [1e-8]]).double()
    for eps, second in ((0.0, 1.0), (1e-7, 0.0)):
        found = factorise_(G.clone(), 0.0, G.clone, eps=eps).solve_(right)
        torch.testing.assert_close(found, torch.tensor([[1.0], [second]]).double())
