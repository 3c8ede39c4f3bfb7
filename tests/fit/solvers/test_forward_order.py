"""RegMean++ and FeatCal against their normal equations on the merged network's own inputs, solved in the test."""

import pytest
import torch
from torch import nn

from stages.core.graph.source import Task
from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import Batch
from stages.core.tracing.sources import make_sources
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair():
    """Two networks of three linear layers with tasks of their own, and the images: (n, 4) each."""
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        for _ in range(2)
    ]
    return networks, [1 + random(50, 4, seed=1), 3 * random(50, 4, seed=2)]


def merge(networks, tasks, fit, shared=None, **settings):
    """shared: how many units of each group."""
    sources = make_sources(networks, [Task(n, ("0", "1", "2")) for n in "ab"], tasks[0], "shared")
    spec = sources[0].trace.spec
    split = full_split(spec, shared and {g: range(shared) for g in spec.free})
    return fit_network(
        sources, identity_matching(spec, 2), split, [Batch(x, t) for t, x in enumerate(tasks)],
        fit, labels="shared", precision=torch.float64, **settings,
    )  # fmt: skip


def layers(merged):
    """Weight and bias of each, in order."""
    nodes = [n for n in merged.trace.graph.nodes if n.operation == "linear"]
    return [(merged.map_of(n).weights[0].data, merged.map_of(n).bias.data) for n in nodes]


def through(found, x, depth):
    for W, b in found[:depth]:
        x = torch.relu(x @ W.T + b)
    return x


@pytest.mark.parametrize("scale", [1.0, 0.9])
@torch.no_grad()
def test_regmean_plus_is_regmean_on_what_the_merged_network_gives(scale):
    networks, tasks = pair()
    merged, record = merge(networks, tasks, Fit(solver="regmean_plus", off_diagonal=scale), ridge=0.0)
    found = layers(merged)
    for depth, (W, b) in enumerate(found):
        inputs = [through(found, x, depth) for x in tasks]
        grams = [z.T @ z for z in inputs]
        grams = [scale * G + (1 - scale) * torch.diag(G.diagonal()) for G in grams]
        own = [network[2 * depth].weight for network in networks]
        right = sum(G @ V.T for G, V in zip(grams, own, strict=True))
        expected = torch.linalg.lstsq(sum(grams), right, driver="gelsd").solution
        for z in inputs:  # a unit that is never on has no weight that counts
            torch.testing.assert_close(z @ W.T, z @ expected)
        torch.testing.assert_close(b, sum(n[2 * depth].bias for n in networks) / 2)
    assert len(record) == 3


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ridge", [None, 0.2])
@torch.no_grad()
def test_featcal_is_its_weighted_least_squares(mix, ridge):
    networks, tasks = pair()
    given = {} if ridge is None else {"ridge": ridge}
    merged, record = merge(networks, tasks, Fit(solver="featcal", mix=mix, **given))
    found, ridge = layers(merged), 0.05 if ridge is None else ridge
    for depth, (W, b) in enumerate(found):
        A, Y, w = [], [], []
        for network, x in zip(networks, tasks, strict=True):
            z, own = through(found, x, depth), network[2 * depth]
            y = mix * own(network[: 2 * depth](x)) + (1 - mix) * own(z)
            centred = z - z.mean(0)
            A.append(z)
            Y.append(y)
            w.append(
                torch.full(
                    (len(z),), 1 / float(torch.linalg.matrix_norm(centred.T @ centred)), dtype=torch.float64
                )
            )
        A, Y, w = torch.cat(A), torch.cat(Y), torch.cat(w)
        start = sum(network[2 * depth].weight for network in networks) / 2
        mean = [(w[:, None] * own).sum(0) / w.sum() for own in (A, Y)]
        Z, R = A - mean[0], Y - mean[1]
        G = Z.T @ (w[:, None] * Z)
        penalty = ridge * G.diagonal().mean() * torch.eye(len(G)).double()
        expected = torch.linalg.solve(G + penalty, Z.T @ (w[:, None] * R) + penalty @ start.T).T
        torch.testing.assert_close(W, expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(b, mean[1] - expected @ mean[0], rtol=1e-7, atol=1e-9)
    assert {line.ridge for line in record} == {ridge}


@pytest.mark.parametrize("solver", ["regmean_plus", "featcal"])
@torch.no_grad()
def test_a_copy_stays_itself_and_separate_units_stay_their_own(solver):
    networks, tasks = pair()
    merged, _ = merge([networks[0], networks[0]], tasks, Fit(solver=solver))
    torch.testing.assert_close(merged(tasks[0]), networks[0](tasks[0]), rtol=1e-8, atol=1e-8)
    merged, _ = merge(networks, tasks, Fit(solver=solver), shared=2)
    whole = merged.features(tasks[0])
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("solver", ["regmean_plus", "featcal"])
@torch.no_grad()
def test_convolutions_and_batch_norms_are_fitted_too(solver, small, images, sources):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    batches = [Batch(images(12, t), t) for t in range(2)]
    for shared in ({}, {g: list(range(v.size // 2)) for g, v in spec.free.items()}):
        merged, record = fit_network(
            made, identity_matching(spec, 2), full_split(spec, shared or None), batches, Fit(solver=solver),
            labels="shared", precision=torch.float64,
        )  # fmt: skip
        assert {line.layer for line in record} == {"conv1", "conv2", "conv3", "conv4", "hidden", "fc"}
        assert torch.isfinite(merged(images(3))).all()
