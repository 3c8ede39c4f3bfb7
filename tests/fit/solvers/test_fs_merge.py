"""FS-Merge: W = M diag(W_1, ..., W_N) U built from its factors in the test, its start, and what is trained."""

import pytest
import torch
from styles import STYLES
from torch import nn

from stages.core.graph.source import Task
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch
from stages.core.tracing.sources import make_sources
from stages.core.units.matching import full_split, identity_matching
from stages.fit.average import fill_average
from stages.fit.network import build, fit_network
from stages.fit.setup import Setup
from stages.fit.solvers.fs_merge import FsMerge, Training, changed
from stages.fit.supernet import Supernet

FIT = Fit(solver="fs_merge", epochs=6, images=40, learning_rate=3e-3, batch_size=32)


def setup_of(sources, labels="shared", kept=None):
    spec = sources[0].trace.spec
    matching, splits = identity_matching(spec, len(sources)), full_split(spec, kept)
    network = build(sources, matching, splits, labels, {})
    fill_average(network, sources)
    return Setup(network, sources, FIT)


def install(setup, supernet):
    for name, value in supernet.tensors().items():
        setup.network.get_parameter(name).data.copy_(value)
    return setup.network


def shaken(supernet):
    """Every trained parameter somewhere else."""
    with torch.no_grad():
        for own in supernet.parameters():
            own += 0.2 * torch.randn(own.shape, dtype=own.dtype)
    return supernet


def matrices(factor, transposed=False):
    """M (d, N d), or U (N d, d)."""
    each = [torch.diag(d) + factor.common @ own.T for d, own in zip(factor.diagonal, factor.own, strict=True)]
    return torch.cat([own.T for own in each]) if transposed else torch.cat(each, 1)


def perceptrons(networks=2, classes=(3, 3, 3)):
    return [
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, n)).double()
        for n in classes[:networks]
    ]


def sources_of(networks, labels="shared"):
    widths = [network[-1].out_features for network in networks]
    tasks = [Task(n, tuple(map(str, range(w)))) for n, w in zip("abc", widths, strict=False)]
    return make_sources(networks, tasks, torch.zeros(1, 4).double(), labels)


@pytest.mark.parametrize("networks", [2, 3])
@torch.no_grad()
def test_the_network_is_its_factors_multiplied_out(networks):
    """The supernet run as it is drawn: U, the networks' own layers side by side, M."""
    own = perceptrons(networks)
    setup = setup_of(sources_of(own))
    supernet = shaken(Supernet(setup, 2))
    merged, x = install(setup, supernet), torch.randn(7, 4).double()
    z, nodes = x, [n for n in merged.trace.graph.nodes if n.operation == "linear"]
    for depth, node in enumerate(nodes):
        key, layers = f"{node.name}_", [network[2 * depth] for network in own]
        read = z.repeat(1, networks) if depth == 0 else z @ matrices(supernet.reads[key], True).T
        side = torch.block_diag(*(layer.weight for layer in layers))
        given = read @ side.T + torch.cat([layer.bias for layer in layers])
        z = given @ matrices(supernet.mixes[key]).T
        z = torch.relu(z) if depth < 2 else z
    torch.testing.assert_close(merged(x), z)


@pytest.mark.parametrize("labels", ["shared", "separate"])
@torch.no_grad()
def test_it_starts_as_the_first_network(labels, small, images, sources):
    made = sources([small(0), small(1), small(2)], images(), labels)
    setup = setup_of(made, labels)
    merged = install(setup, Supernet(setup, 12))
    told = {"task": "a"} if labels == "separate" else {}
    torch.testing.assert_close(merged(images(6, 3), **told), made[0](images(6, 3)))
    torch.testing.assert_close(merged.features(images(6, 3)), made[0].features(images(6, 3)))


class Mixed(nn.Module):
    """A norm in front of a layer, a grouped convolution, a layer norm and a scale."""

    def __init__(self, seed):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.grouped, self.after = nn.Conv2d(4, 4, 3, groups=4), nn.LayerNorm(4)
        self.scale, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(x))  # alone
        x = torch.relu(self.grouped(x)).mean((2, 3))
        return self.fc(self.after(x) * self.scale)


@torch.no_grad()
def test_all_kinds_of_parameters_start_as_the_first_networks(randomise, images, sources):
    own = [randomise(Mixed(m), m) for m in range(2)]
    made = sources(own, images())
    setup = setup_of(made)
    merged = install(setup, Supernet(setup, 12))
    torch.testing.assert_close(merged(images(5)), own[0](images(5)))
    tasks = [Batch(images(20, m), m) for m in range(2)]
    spec = made[0].trace.spec
    found, _ = fit_network(
        made, identity_matching(spec, 2), full_split(spec), tasks, FIT, labels="shared", precision=torch.float64
    )  # fmt: skip
    assert torch.isfinite(found(images(3))).all()


@pytest.mark.parametrize("style", ["eca", "mlp-mixer"])
@torch.no_grad()
def test_maps_beside_the_units_start_as_the_first_networks(style):
    make, shape = STYLES[style]
    networks, x = [make().double().eval() for _ in range(2)], torch.randn(6, *shape).double()
    tasks = [Task(n, tuple(map(str, range(networks[0](x).shape[1])))) for n in "ab"]
    made = make_sources(networks, tasks, x[:1], "shared")
    setup = setup_of(made)
    torch.testing.assert_close(install(setup, Supernet(setup, 12))(x), made[0](x))


@pytest.mark.parametrize("labels", ["shared", "separate"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_loss_falls_and_the_network_is_what_was_trained(labels, share, small, images, sources):
    own = [small(m, 3 + m * (labels == "separate")) for m in range(2)]
    made = sources(own, images(), labels)
    spec = made[0].trace.spec
    splits = full_split(spec, {g: range(max(1, int(v.size * share))) for g, v in spec.free.items()})
    batches = [Batch(images(40, m), m) for m in range(2)]
    before = [{name: t.clone() for name, t in s.state.items()} for s in made]
    merged, record = fit_network(
        made, identity_matching(spec, 2), splits, batches, FIT, labels=labels, precision=torch.float64
    )  # fmt: skip
    losses = merged.about["fs_merge"]["losses"]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert len(record) == 1
    for source, state in zip(made, before, strict=True):  # gradients go to M and U alone
        assert all(torch.equal(t, state[name]) for name, t in source.state.items())
        assert all(t.grad is None for t in source.state.values())
    assert all(p.grad is None for p in merged.parameters())


@torch.no_grad()
def test_exact_statistics_leave_what_was_trained_as_it_is(small, images, sources):
    """What the batch norms get at the end changes nothing."""
    made = sources([small(0), small(1)], images())
    setup = setup_of(made)
    found = FsMerge(setup, Training(epochs=2, images=40))
    with torch.enable_grad():
        found.fit([images(40, m) for m in range(2)])
    network, x = setup.network, images(9, 5)
    before = network(x)
    from stages.core.sweep.norms import set_statistics

    set_statistics(network, setup.exact, [Batch(images(40, m), m) for m in range(2)], same=True)
    torch.testing.assert_close(network(x), before)
    assert any(bool((t != 0).any()) for name, t in network.state_dict().items() if "running_mean" in name)


def test_everything_separate_stays_as_it_is(small, images, sources):
    made = sources([small(0), small(1)], images(), "separate")
    spec = made[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    batches = [Batch(images(40, m), m) for m in range(2)]
    merged, record = fit_network(
        made, identity_matching(spec, 2), split, batches, FIT, labels="separate", precision=torch.float64
    )  # fmt: skip
    assert not record
    for task, source in zip("ab", made, strict=True):
        torch.testing.assert_close(merged(images(4), task=task), source(images(4)))


def test_an_alignment_by_matrices_is_refused(small, images):
    from stages import merge

    networks = {name: small(seed) for seed, name in enumerate("ab")}
    batches = {name: images(16, seed) for seed, name in enumerate("ab")}
    row = {"match": "zipit", "fit": {"solver": "fs_merge"}}
    with pytest.raises(
        InputError, match="found fs_merge behind an alignment by matrices; allowed: a matching"
    ):
        merge(networks, batches, 1.0, row, progress=False)


def test_changed_images_are_of_the_same_kind():
    x = torch.rand(64, 3, 16, 16)
    found = changed(x, torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
    assert not any(torch.equal(a, b) for a, b in zip(found, x, strict=True))
    grey = sum(bool((own == own[:1]).all()) for own in found)
    assert 8 < grey < 40
