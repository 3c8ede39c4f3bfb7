import copy
import itertools

import pytest
import torch
from torch import nn

from stages.core.networks.architectures import build
from stages.core.tracing.trace import trace
from stages.core.units.groups import permute
from stages.match.assign import assign
from stages.match.weights import STATISTICS, WeightProblem, ascend, match_weights

X = torch.zeros(1, 3, 8, 8)


def resnet(randomise, seed, classes=4):
    return randomise(build("resnet", {"depth": 8, "width": 8, "classes": classes}), seed)


def mlp(randomise, seed, classes=4):
    layers = [
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, classes),
    ]
    return randomise(nn.Sequential(*layers), seed)


KINDS = {"resnet": resnet, "mlp": mlp}


def match(networks, seed=0, **settings):
    spec = trace(networks[0], X.to(next(networks[0].parameters()))).spec
    states = [network.state_dict() for network in networks]
    return spec, *match_weights(spec, states, torch.Generator().manual_seed(seed), **settings)


def objective(spec, states, units):
    """Inner products of all pairs of aligned networks, over the weights that hold units."""
    counted = {span.axis.parameter for group in spec.free.values() for span in group.spans}
    counted = [name for name in counted if not name.endswith(STATISTICS)]
    aligned = [
        permute(state, spec, {name: rows[m] for name, rows in units.items()})
        for m, state in enumerate(states)
    ]
    pairs = itertools.combinations(aligned, 2)
    return sum(float((a[name] * b[name]).sum()) for a, b in pairs for name in counted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_sweep_lowers_the_objective(kind, networks, seed, randomise):
    made = [KINDS[kind](randomise, 10 * seed + m) for m in range(networks)]
    spec, units, values = match(made, seed)
    assert all(after >= before - 1e-10 * abs(before) for before, after in itertools.pairwise(values))
    identity = {name: torch.arange(rows.shape[1]).repeat(networks, 1) for name, rows in units.items()}
    assert values[-1] > objective(spec, [n.state_dict() for n in made], identity)
    assert values[-1] == pytest.approx(objective(spec, [n.state_dict() for n in made], units))
    for name, rows in units.items():
        assert rows[0].tolist() == list(range(spec.groups[name].size))
        assert all(sorted(row) == rows[0].tolist() for row in rows.tolist())


class Stream(nn.Module):
    """Every weight but the ends has the one group on both its axes, so a step's gain is not linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(2, 5), nn.Linear(5, 2)
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.fc(x)


@pytest.mark.parametrize("networks", [2, 3])
def test_no_sweep_lowers_the_objective_of_units_on_both_axes(networks, randomise):
    for seed in range(10):
        made = [randomise(Stream(), 10 * seed + m) for m in range(networks)]
        spec = trace(made[0], torch.zeros(1, 2)).spec
        states = [network.state_dict() for network in made]
        units, values = match_weights(spec, states, torch.Generator().manual_seed(seed))
        assert all(after >= before - 1e-12 for before, after in itertools.pairwise(values))
        assert values[-1] == pytest.approx(objective(spec, states, units))


class Doubled(nn.Module):
    """The hidden units lie twice on one axis of the second layer: the gain of a step stays linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(torch.cat([x.relu(), x.sigmoid()], 1))


@pytest.mark.parametrize("networks", [2, 3])
def test_the_objective_is_found_without_valuing_units_that_lie_twice_on_one_axis(
    networks, randomise, monkeypatch
):
    monkeypatch.setattr(WeightProblem, "_part", None)  # it values all weights of a group again
    for seed in range(10):
        made = [randomise(Doubled(), 10 * seed + m).double() for m in range(networks)]
        spec = trace(made[0], torch.zeros(1, 6, dtype=torch.float64)).spec
        states = [network.state_dict() for network in made]
        units, values = match_weights(spec, states, torch.Generator().manual_seed(seed))
        identity = {name: torch.arange(rows.shape[1]).repeat(networks, 1) for name, rows in units.items()}
        assert values[-1] > objective(spec, states, identity)
        assert values[-1] == pytest.approx(objective(spec, states, units), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_permutations_of_permuted_copies_are_recovered(kind, networks, noise, randomise, copies):
    for seed in range(3):
        original = KINDS[kind](randomise, seed)
        made, matching = copies(original, X.to(next(original.parameters())), networks, seed)
        for network in made[1:]:
            for tensor in network.parameters():
                tensor.data += noise * tensor.std() * torch.randn_like(tensor)
        _, units, _ = match(made, seed)
        assert all(torch.equal(rows, matching.units[name]) for name, rows in units.items())


def test_running_statistics_do_not_count(randomise):
    made = [resnet(randomise, m) for m in (0, 1)]
    other = copy.deepcopy(made)
    for name, tensor in other[1].state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.copy_(torch.rand(tensor.shape))
    _, units, values = match(made)
    _, same, others = match(other)
    assert values == others
    assert all(torch.equal(rows, same[name]) for name, rows in units.items())


def test_norm_weights_and_biases_count(randomise, copies):
    """Where all convolutions are equal, only the batch norms tell the units apart."""
    network = resnet(randomise, 0)
    for tensor in network.state_dict().values():
        if tensor.dim() > 1:
            tensor.fill_(1.0)
    made, matching = copies(network, X.double())
    _, units, _ = match(made)
    assert all(torch.equal(rows, matching.units[name]) for name, rows in units.items())


def test_heads_of_different_sizes_do_not_count(randomise, copies):
    network = resnet(randomise, 0)
    made, matching = copies(network, X.double())
    other = resnet(randomise, 5, classes=7)
    other.load_state_dict(
        {**made[1].state_dict(), **{f"fc.{n}": t for n, t in other.fc.state_dict().items()}}
    )
    _, units, values = match([made[0], other])
    assert all(torch.equal(rows, matching.units[name]) for name, rows in units.items())
    assert all(after >= before for before, after in itertools.pairwise(values))


def test_the_same_seed_gives_the_same_matching(randomise):
    made = [resnet(randomise, m) for m in (0, 1, 2)]
    (_, first, values), (_, again, repeated) = match(made, 3), match(made, 3)
    assert values == repeated
    assert all(torch.equal(rows, again[name]) for name, rows in first.items())


def test_matching_leaves_the_networks_as_they_were(randomise):
    made = [resnet(randomise, m) for m in (0, 1)]
    before = [copy.deepcopy(network.state_dict()) for network in made]
    match(made)
    for network, state in zip(made, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def plain_ascent(spec, states, seed):
    """Coordinate ascent as it is written in the paper: every group in turn, its gain from all of its weights."""
    units = {name: torch.arange(group.size).repeat(len(states), 1) for name, group in spec.free.items()}
    names, generator = list(spec.free), torch.Generator().manual_seed(seed)
    value = objective(spec, states, units)
    while True:
        for m in range(1, len(states)):
            for index in torch.randperm(len(names), generator=generator).tolist():
                name, gain = names[index], 0.0
                for n in (n for n in range(len(states)) if n != m):
                    theirs = permute(states[n], spec, {g: own[n] for g, own in units.items()})
                    mine = permute(states[m], spec, {g: own[m] for g, own in units.items() if g != name})
                    for span in spec.free[name].spans:
                        if not span.axis.parameter.endswith(STATISTICS):
                            a, b = (
                                own[span.axis.parameter].movedim(span.axis.dim, 0) for own in (theirs, mine)
                            )
                            gain = gain + a.reshape(len(a), -1) @ b.reshape(len(b), -1).T
                new, every = assign(gain), torch.arange(spec.free[name].size)
                if gain[every, new].sum() > gain[every, units[name][m]].sum():
                    units[name][m] = new
        before, value = value, objective(spec, states, units)
        if value - before <= 1e-12 * abs(value):
            return units, value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("networks", [2, 3])
def test_what_is_left_out_and_what_is_updated_changes_nothing(kind, networks, randomise, monkeypatch):
    for seed in range(10):
        made = [KINDS[kind](randomise, 10 * seed + m).double() for m in range(networks)]
        spec, states = trace(made[0], X.double()).spec, [network.state_dict() for network in made]
        problem, everything = WeightProblem(spec, states), torch.Generator().manual_seed(seed)
        start = {name: torch.arange(g.size).repeat(networks, 1) for name, g in spec.free.items()}
        visits, improve = [], WeightProblem.improve
        monkeypatch.setattr(WeightProblem, "improve", lambda *a, v=visits, i=improve: (v.append(1), i(*a))[1])
        values = ascend(problem, start, range(1, networks), everything, 100, 1e-12)
        monkeypatch.setattr(WeightProblem, "improve", improve)
        units, value = plain_ascent(spec, states, seed)
        assert values[-1] == pytest.approx(value, rel=1e-10)
        assert all(torch.equal(start[name], own) for name, own in units.items())
        assert len(visits) < (len(values) - 1) * (networks - 1) * len(units)
