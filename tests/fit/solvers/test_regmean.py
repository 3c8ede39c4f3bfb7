"""RegMean against its normal equations, solved in the test."""

import pytest
import torch
from torch import nn

from stages.core.graph.source import Task
from stages.core.recipe.methods import Fit
from stages.core.recipe.rooms import check_fit
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch
from stages.core.tracing.sources import make_sources
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network
from stages.fit.solvers.regmean import regression_mean


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("networks", [2, 3])
def test_it_is_the_least_squares_solution_over_every_network_on_its_own_rows(networks):
    """min_W sum_t |X_t W - X_t W_t|^2, stacked."""
    X = [random(30, 5, seed=t) for t in range(networks)]
    W = [random(4, 5, seed=10 + t) for t in range(networks)]
    found = regression_mean([x.T @ x for x in X], W, 0.0)
    targets = torch.cat([x @ w.T for x, w in zip(X, W, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(X), targets).solution.T
    torch.testing.assert_close(found.weight, expected)
    torch.testing.assert_close(found.residual, (torch.cat(X) @ expected.T - targets).square().sum(0))
    torch.testing.assert_close(found.energy, targets.square().sum(0))


def test_what_no_image_tells_stays_the_mean():
    G = torch.diag(torch.tensor([1.0, 0.0, 2.0]).double())
    W = [random(2, 3, seed=t) for t in range(2)]
    found = regression_mean([G, G], W, 0.0)
    torch.testing.assert_close(found.weight, (W[0] + W[1]) / 2)


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.0])
def test_a_network_is_merged_by_the_normal_equations_layer_by_layer(scale):
    networks = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double() for _ in range(2)]
    tasks = [random(50, 4, seed=t) for t in range(2)]
    sources = make_sources(networks, [Task(n, ("0", "1", "2")) for n in "ab"], tasks[0], "shared")
    spec = sources[0].trace.spec
    merged, record = fit_network(
        sources, identity_matching(spec, 2), full_split(spec), [Batch(x, t) for t, x in enumerate(tasks)],
        Fit(solver="regmean", off_diagonal=scale), labels="shared", ridge=0.0, precision=torch.float64,
    )  # fmt: skip
    inputs = [[x, torch.relu(network[0](x)).detach()] for network, x in zip(networks, tasks, strict=True)]
    for index, layer in enumerate((0, 2)):
        grams = [own[index].T @ own[index] for own in inputs]
        grams = [scale * G + (1 - scale) * torch.diag(G.diagonal()) for G in grams]
        weights = [network[layer].weight.detach() for network in networks]
        right = sum(G @ W.T for G, W in zip(grams, weights, strict=True))
        node = next(n for n in merged.trace.graph.nodes if n.parameters.get("weight") == f"{layer}.weight")
        found = merged.map_of(node)
        torch.testing.assert_close(found.weights[0].data, torch.linalg.solve(sum(grams), right).T)
        torch.testing.assert_close(found.bias.data, sum(n[layer].bias.data for n in networks) / 2)
    assert [line.layer for line in record] == ["0", "2"]


@pytest.mark.parametrize(("key", "value"), [("inputs", "source"), ("targets", "own"), ("norm", "average")])
def test_settings_that_it_has_by_definition_are_refused(key, value):
    with pytest.raises(
        InputError, match=f"{key}: not a setting of solver: regmean; allowed: solver, ridge, off"
    ):
        check_fit(Fit.model_validate({"solver": "regmean", key: value}))
