"""Each alignment against an independent reference: what defines it, on random moments."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from stages.core.align.ways.cca import cca_transform
from stages.core.align.ways.transport import transport
from stages.core.align.ways.zip import zip_clusters
from stages.core.units.moments import Moments

SEEDS = st.integers(0, 10_000)


def joint(k, networks, seed, rows=60):
    """Random correlated features (rows, N k) and their moments."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    x = draw(rows, networks * k) @ draw(networks * k, networks * k)
    return x, Moments(x.mean(0), x.T @ x / rows, (k,) * networks)


# -- canonical correlations -----------------------------------------------------------------------------------------


@given(k=st.integers(1, 6), seed=SEEDS, ridge=st.sampled_from([1e-8, 0.1, 3.0]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_cca_gives_the_covariance_of_the_first_and_its_inverse_is_exact(k, seed, ridge):
    x, moments = joint(k, 2, seed)
    centred = x - x.mean(0)
    S = centred.T @ centred / len(x)
    torch.testing.assert_close(moments.covariance, S)
    S_aa, S_bb, S_ab = S[:k, :k], S[k:, k:], S[:k, k:]
    T, inverse = cca_transform(S_aa, S_bb, S_ab, ridge)
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(T @ inverse, identity, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        T @ (S_bb + ridge * identity) @ T.T, S_aa + ridge * identity, rtol=1e-6, atol=1e-6
    )


def test_cca_correlations_are_those_of_the_textbook():
    """In whitened coordinates the transform pairs directions in the order of the canonical correlations."""
    x, _ = joint(4, 2, 0, rows=400)
    S = torch.from_numpy(np.cov(x.numpy(), rowvar=False, bias=True))
    S_aa, S_bb, S_ab = S[:4, :4], S[4:, 4:], S[:4, 4:]
    T, _ = cca_transform(S_aa, S_bb, S_ab, 1e-12)
    squared = torch.linalg.eigvals(torch.linalg.solve(S_aa, S_ab) @ torch.linalg.solve(S_bb, S_ab.T)).real
    values, vectors = torch.linalg.eigh(S_aa)
    white = (
        vectors * values.rsqrt()
    ) @ vectors.T  # the whitened covariance of a and T b is symmetric, and has them
    found = torch.linalg.eigvalsh(white @ S_ab @ T.T @ white)
    torch.testing.assert_close(found.sort().values, squared.sqrt().sort().values, rtol=1e-5, atol=1e-5)


# -- transport ------------------------------------------------------------------------------------------------------


@given(k=st.integers(1, 6), seed=SEEDS, soft=st.sampled_from([0.0, 0.01, 0.1, 1.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_marginals_of_a_plan_are_uniform(k, seed, soft):
    plan = transport(np.random.default_rng(seed).random((k, k)), soft)
    assert (plan >= 0).all()
    np.testing.assert_allclose(plan.sum(1), 1 / k, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(0), 1 / k, rtol=1e-9)


@given(n=st.integers(1, 7), seed=SEEDS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_exact_transport_is_the_assignment(n, seed):
    cost = np.random.default_rng(seed).random((n, n))
    plan = transport(cost)
    rows, columns = linear_sum_assignment(cost)
    assert (plan * n)[rows, columns].tolist() == [1.0] * n
    dense = [np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))]
    best = linprog(cost.ravel(), A_eq=np.vstack(dense), b_eq=np.full(2 * n, 1 / n)).fun
    assert (plan * cost).sum() == pytest.approx(best)


def test_soft_transport_nears_the_exact_one_as_it_hardens():
    cost = np.random.default_rng(0).random((5, 5))
    exact = (transport(cost) * cost).sum()
    excess = [(transport(cost, soft) * cost).sum() - exact for soft in (1.0, 0.1, 0.01, 0.001)]
    assert excess == sorted(excess, reverse=True)
    assert excess[-1] < 1e-3
    assert excess[0] > 1e-2


def test_equal_costs_are_no_obstacle():
    np.testing.assert_allclose(transport(np.zeros((3, 3)), 0.01), 1 / 9)


# -- zip ------------------------------------------------------------------------------------------------------------


def greedy(similarity, owner, width, alpha, beta):
    """ZipIt! as it is defined, without any short cut."""
    clusters = [{i} for i in range(len(owner))]
    value = {frozenset(p): similarity[p] for p in itertools.combinations(range(len(owner)), 2)}
    left = {m: int(beta * (owner == m).sum()) for m in set(owner.tolist())}

    alive, closed = set(range(len(owner))), set()
    while len(alive) > width:
        for m in (m for m, count in left.items() if count <= 0):
            own = [i for i in alive if {owner[u] for u in clusters[i]} == {m}]
            closed |= {frozenset(p) for p in itertools.combinations(own, 2)}
        pairs = list(itertools.combinations(sorted(alive), 2))
        allowed = [p for p in pairs if frozenset(p) not in closed] or pairs
        if allowed is pairs:
            closed = set()
        i, j = max(allowed, key=lambda p: value[frozenset(p)])
        owners = {owner[u] for u in clusters[i] | clusters[j]}
        if len(owners) == 1:
            left[owners.pop()] -= 1
        clusters[i] |= clusters[j]
        alive -= {j}
        for other in alive - {i}:
            first, second = frozenset((i, other)), frozenset((j, other))
            value[first] = alpha * min(value[first], value[second])
            if second in closed:
                closed.add(first)
    return {frozenset(clusters[i]) for i in alive}


@given(
    k=st.integers(1, 5), networks=st.integers(2, 3), seed=SEEDS,
    alpha=st.sampled_from([0.1, 0.7, 1.0]), beta=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_clusters_are_those_of_the_definition(k, networks, seed, alpha, beta):
    _, moments = joint(k, networks, seed)
    similarity, owner = moments.similarity("correlation").numpy(), np.repeat(np.arange(networks), k)
    found = zip_clusters(similarity, owner, k, alpha, beta)
    clusters = {frozenset(np.flatnonzero(found == c).tolist()) for c in range(found.max() + 1)}
    assert sorted(i for cluster in clusters for i in cluster) == list(range(networks * k))  # a partition
    assert len(clusters) == k
    assert clusters == greedy(similarity, owner, k, alpha, beta)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5])
def test_no_network_loses_more_units_within_itself_than_beta_allows(beta):
    k, rng = 8, np.random.default_rng(0)
    twins = rng.standard_normal((200, 1)) + 0.01 * rng.standard_normal(
        (200, k)
    )  # one network's units are all alike
    similarity = np.corrcoef(np.hstack([twins, rng.standard_normal((200, k))]), rowvar=False)
    found = zip_clusters(similarity, np.repeat([0, 1], k), k, 1.0, beta)
    assert k - len(np.unique(found[:k])) == int(beta * k)  # all of the share is used, and no more


def test_without_a_share_two_networks_are_matched():
    _, moments = joint(6, 2, 3)
    similarity = moments.similarity("correlation").numpy()
    found = zip_clusters(similarity, np.repeat([0, 1], 6), 6, 1.0, 0.0)
    assert sorted(found[:6]) == sorted(found[6:]) == list(range(6))
