import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.match.assign import Assigner, assign, assign_parts_jointly


def generator(seed):
    return torch.Generator().manual_seed(seed)


def joint(seed, networks, d, noise):
    """Similarities of noisy features whose units were permuted, and the permutations."""
    g = generator(seed)
    common = torch.randn(200, d, generator=g, dtype=torch.float64)
    units = torch.stack([torch.arange(d), *(torch.randperm(d, generator=g) for _ in range(1, networks))])
    rows = []
    for m in range(networks):
        own = common + noise * torch.randn(200, d, generator=g, dtype=torch.float64)
        rows.append(own[:, units[m].argsort()])  # unit units[m][j] shows what unit j of the reference does
    full = torch.corrcoef(torch.cat(rows, 1).T)
    return full.view(networks, d, networks, d).transpose(1, 2), units


def assign_jointly(similarities, sweeps=100):
    """Units without parts, as parts of one unit each."""
    return assign_parts_jointly({"": similarities}, similarities.shape[-1], sweeps)[0]


def objective(similarities, units):
    pairs = itertools.combinations(range(len(units)), 2)
    return sum(float(similarities[m, n][units[m], units[n]].sum()) for m, n in pairs)


@given(d=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_assignment_is_the_best_of_all(d, seed):
    gain = torch.randn(d, d, generator=generator(seed))
    best = max(
        itertools.permutations(range(d)), key=lambda p: sum(gain[i, j].item() for i, j in enumerate(p))
    )
    assert assign(gain).tolist() == list(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_hidden_permutation_is_recovered(dtype):
    hidden = torch.randperm(64, generator=generator(0))
    gain = torch.zeros(64, 64)
    gain[torch.arange(64), hidden] = 1.0
    noisy = gain + 0.3 * torch.rand(64, 64, generator=generator(1))
    assert torch.equal(assign(noisy.to(dtype)), hidden)


@pytest.mark.parametrize("networks", [2, 3, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_hidden_permutations_of_several_networks_are_recovered(networks, noise):
    for seed in range(3):
        similarities, units = joint(seed, networks, 20, noise)
        assert torch.equal(assign_jointly(similarities), units)


@given(networks=st.integers(2, 4), d=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_sweep_of_a_joint_assignment_is_at_least_as_good(networks, d, seed):
    similarities, _ = joint(seed, networks, d, 3.0)
    found = [assign_jointly(similarities, sweeps) for sweeps in (0, 1, 2, 3, 100)]
    values = [objective(similarities, units) for units in found]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(values))
    assert all(sorted(row) == list(range(d)) for row in found[-1].tolist())
    assert found[-1][0].tolist() == list(range(d))


@given(networks=st.integers(2, 3), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_no_network_alone_can_be_matched_better(networks, seed):
    similarities, _ = joint(seed, networks, 4, 3.0)
    units = assign_jointly(similarities)
    reached = objective(similarities, units)
    for m in range(1, networks):
        for order in itertools.permutations(range(4)):
            other = units.clone()
            other[m] = torch.tensor(order)
            assert objective(similarities, other) <= reached + 1e-9


def test_two_networks_are_matched_exactly():
    similarities, _ = joint(0, 2, 5, 3.0)
    orders = [torch.tensor([range(5), order]) for order in itertools.permutations(range(5))]
    best = max(objective(similarities, units) for units in orders)
    assert objective(similarities, assign_jointly(similarities)) == pytest.approx(best)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
@pytest.mark.parametrize("common", [0.0, 1.0, 1e4])
def test_assignments_one_after_the_other_are_each_the_best(size, common):
    """common: how much larger than their differences the gains are, as those of weights around one are."""
    g = generator(size)

    def drawn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    large = common * torch.outer(1 + 0.1 * drawn(size), 1 + 0.1 * drawn(size))
    gain, solve, every = drawn(size, size), Assigner(), torch.arange(size)
    for change in (0.0, 0.0, 0.01, 0.3, 5.0):
        gain = gain + change * drawn(size, size)
        order = solve(gain + large)
        assert sorted(order.tolist()) == every.tolist()
        best = (gain + large)[every, assign(gain + large)].sum()
        assert torch.isclose((gain + large)[every, order].sum(), best, rtol=1e-12, atol=1e-9)


def test_prices_are_for_one_kind_of_gain_and_harm_no_other():
    """After gains of another scale, and after ties of all units."""
    solve, gain = Assigner(), torch.randn(9, 9, generator=generator(1)).double()
    solve(1e6 * gain)
    assert torch.equal(solve(-gain), assign(-gain))
    assert sorted(solve(torch.zeros(9, 9)).tolist()) == list(range(9))
    assert torch.equal(solve(gain), assign(gain))
