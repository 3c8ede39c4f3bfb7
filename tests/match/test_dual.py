"""MuDSC's matching against the two pure ones, and by its own definition."""

import pytest
import torch

from stages.core.sweep.batches import images_to_batches
from stages.core.tracing.trace import trace
from stages.core.units.groups import permute
from stages.core.units.moments import pool
from stages.match.assign import assign, assign_parts_jointly
from stages.match.dual import match_dual
from stages.statistics.moments import gather


@pytest.fixture
def problem(small, images, sources):
    """(number of networks) -> spec, states, correlations of activations."""

    def make(networks=2):
        made = sources([small(m, bias=True) for m in range(networks)], images())
        batches = images_to_batches([images(40, m) for m in range(networks)], 20)
        statistics = pool(gather(made, batches, precision=torch.float64), networks, networks)
        alike = {g: m.between("correlation") for g, m in statistics.after.items()}
        return made[0].trace.spec, [source.state for source in made], alike

    return make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_alike(spec, states, units, name):
    """Pearson correlation of the units' weights of network 1 with those of network 0, neighbours in order (numpy's)."""
    states = [{p: t for p, t in s.items() if "running" not in p and "num_batches" not in p} for s in states]
    orders = {g: own[1] for g, own in units.items() if g != name}
    second = permute(states[1], _weights_only(spec), orders)
    rows = [[], []]
    for span in spec.groups[name].spans:
        if span.axis.parameter in states[0]:
            for found, state in zip(rows, (states[0], second), strict=True):
                own = state[span.axis.parameter].movedim(span.axis.dim, 0)
                own = own.narrow(0, span.start, spec.groups[name].size * span.block)
                found.append(own.reshape(spec.groups[name].size, -1))
    first, other = (torch.cat(found, 1) for found in rows)
    d = len(first)
    return torch.corrcoef(torch.cat([first, other]))[:d, d:]


def _weights_only(spec):
    keep = lambda span: "running" not in span.axis.parameter  # noqa: E731
    groups = {
        name: type(group)(name, group.size, tuple(filter(keep, group.spans)), group.fixed)
        for name, group in spec.groups.items()
    }
    return type(spec)(groups)


@pytest.mark.parametrize("networks", [2, 3])
def test_without_weights_it_is_the_matching_by_activations(problem, networks):
    spec, states, alike = problem(networks)
    found, _ = match_dual(spec, states, alike, 0.0, generator())
    for name, units in found.items():
        assert torch.equal(units, assign_parts_jointly({name: alike[name]}, alike[name].shape[-1])[0])


def test_with_weights_alone_it_is_a_fixed_point_of_the_matching_by_weights(problem):
    spec, states, alike = problem()
    nonsense = {name: own[..., torch.randperm(own.shape[-1])] for name, own in alike.items()}
    found, value = match_dual(spec, states, nonsense, 1.0, generator())
    again, _ = match_dual(spec, states, nonsense, 1.0, generator())
    gains = []
    for name, units in found.items():
        assert torch.equal(units, again[name])
        similarity = weights_alike(spec, states, found, name)
        best, rows = assign(similarity), torch.arange(len(similarity))
        assert similarity[rows, units[1]].sum() == pytest.approx(float(similarity[rows, best].sum()))
        gains.append(similarity[rows, units[1]].mean())
    assert value == pytest.approx(float(torch.stack(gains).mean()))


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
def test_no_group_alone_can_be_matched_better(problem, rho):
    spec, states, alike = problem()
    found, _ = match_dual(spec, states, alike, rho, generator())
    for name, units in found.items():
        similarity = rho * weights_alike(spec, states, found, name) + (1 - rho) * alike[name][0, 1]
        rows = torch.arange(len(similarity))
        assert similarity[rows, units[1]].sum() >= similarity[rows, assign(similarity)].sum() - 1e-9


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_a_permuted_copy_is_recovered(rho, small, images, sources, copies, calibrate):
    network = small(0, bias=True)
    network.hidden.bias.data += 10  # a unit that never fires correlates with nothing
    network.conv4.bias.data += 2
    network = calibrate(network, images(64))
    networks, expected = copies(network, images(), n=3)
    made = sources(networks, images())
    batches = images_to_batches([images(40, m) for m in range(3)], 20)
    statistics = pool(gather(made, batches, precision=torch.float64), 3, 3)
    alike = {g: m.between("correlation") for g, m in statistics.after.items()}
    spec = trace(network, images()).spec
    found, value = match_dual(spec, [s.state for s in made], alike, rho, generator())
    for name, units in expected.units.items():
        assert torch.equal(found[name], units)
    assert value == pytest.approx(1.0)
