"""Neuron interpolation: k-means on inner products, levels that are fitted to centroids, a head to the mean softmax."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.align.order import align
from stages.core.align.solve import make_alignment
from stages.core.align.ways.kmeans import lloyd, start
from stages.core.recipe.known import known_methods
from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import images_to_batches
from stages.core.units.matching import full_split
from stages.core.units.moments import pool
from stages.fit.network import fit_network
from stages.fit.solvers import interpolation
from stages.match.matching import make_matching
from stages.statistics.moments import gather

KNOWN = known_methods()
WAY, FIT = KNOWN.match["neuron_interpolation"], KNOWN.methods["neuron_interpolation"].fit


# -- clusters -------------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 20), k=st.integers(1, 20), few=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_loss_never_rises_and_no_cluster_is_empty(n, k, few, seed):
    k, rng = min(n, k), np.random.default_rng(seed)
    x = rng.standard_normal((n, 5))
    if few:  # fewer places than clusters
        x = x[rng.integers(0, max(1, k // 2), n)]
    first = start(x @ x.T, k, rng)
    cluster, losses = lloyd(x @ x.T, first, 100)
    for own in (first, cluster):
        assert set(own.tolist()) == set(range(k))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))
    means = np.stack([x[cluster == c].mean(0) for c in range(k)])
    assert losses[-1] == pytest.approx(((x - means[cluster]) ** 2).sum(), abs=1e-9)
    if len(losses) < 100 and not few:  # at the end every point is with the mean that is nearest
        far = ((x[:, None] - means) ** 2).sum(2)
        assert far[np.arange(n), cluster] == pytest.approx(far.min(1))


class Case:
    def __init__(self, sources, tasks, labels="shared"):
        self.sources, self.labels, self.batches = sources, labels, images_to_batches(tasks, 16)
        gathered = gather(sources, self.batches, precision=torch.float64)
        self.statistics = pool(gathered, len(sources), len(sources))
        self.matching, _ = make_matching(sources, WAY, self.statistics, torch.Generator())

    def merge(self, kept=None, fit=FIT):
        splits = full_split(self.sources[0].trace.spec, kept)
        self.alignment = make_alignment(WAY, self.sources, lambda: self.statistics, self.matching, splits)
        self.aligned = align(self.sources, self.matching, splits)
        return fit_network(
            self.sources, self.matching, splits, self.batches, fit, labels=self.labels,
            alignment=self.alignment, ridge=1e-9, precision=torch.float64,
        )  # fmt: skip


@pytest.fixture
def case(small, images, sources, calibrate):
    def make(networks=2, labels="shared", images_of_task=64):
        tasks = [images(images_of_task, m) for m in range(networks)]
        classes = [3 + m * (labels == "separate") for m in range(networks)]
        own = [calibrate(small(m, classes[m], bias=True), x) for m, x in enumerate(tasks)]
        for network in own:
            network.fc.weight.data *= 5  # sure of what they say
        return Case(sources(own, tasks[0], labels), tasks, labels)

    return make


@pytest.mark.parametrize("networks", [2, 3])
def test_each_cluster_of_a_permuted_copy_is_a_unit_in_all_networks(
    networks, small, images, sources, copies, calibrate
):
    original = small(0, bias=True)
    original.hidden.bias.data += 2  # a unit that never fires could be any other
    original = calibrate(original, images(64))
    made, expected = copies(original, images(), n=networks)
    found = Case(sources(made, images()), [images(64, m) for m in range(networks)])
    merged, record = found.merge()
    for name, units in found.matching.units.items():
        assert torch.equal(units, expected.units[name])
    for group in found.alignment.groups.values():
        for unmerge in group.unmerges:
            assert torch.equal(unmerge, group.unmerges[0])
            assert torch.equal(unmerge.sum(0), torch.ones(len(unmerge)).double())
    torch.testing.assert_close(merged(images(8, 5)), original(images(8, 5)), rtol=1e-5, atol=1e-6)
    assert max(line.residual for line in record) < 1e-8


# -- levels ---------------------------------------------------------------------------------------------------------


def values(source, x):
    """All values of a source."""
    found = {source.graph.nodes[0].name: x}
    for node in source.graph.nodes[1:]:
        found[node.name] = source.run_node(node, [found[name] for name in node.inputs])
    return found


@pytest.mark.parametrize("networks", [2, 3])
def test_the_targets_of_a_level_are_the_centroids(networks, case, monkeypatch):
    seen, fit = {}, interpolation.Level.fit

    def watched(self, problem):
        for index, _, _ in problem.batches():
            seen.setdefault(problem.node.name, []).append(problem.targets(index).clone())
        return fit(self, problem)

    monkeypatch.setattr(interpolation.Level, "fit", watched)
    found = case(networks)
    merged, _ = found.merge()
    x = torch.cat([batch.images for batch in found.batches])
    own = [values(source, x) for source in found.aligned]
    behind = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    groups = found.alignment.groups
    for name, targets in seen.items():
        segments = merged.trace.layouts[name].segments
        if segments[0].group not in groups:
            continue  # the logits
        unmerges = groups[segments[0].group].unmerges
        cluster = torch.cat(unmerges).argmax(1)
        units = torch.cat([value[behind.get(name, name)] for value in own], 1)
        for c in range(len(unmerges[0])):
            mean = units[:, cluster == c].mean(1)
            torch.testing.assert_close(torch.cat(targets)[:, c], mean)


# -- the head -------------------------------------------------------------------------------------------------------


def cross_entropy(goal, logits):
    return float(-(goal * logits.log_softmax(1)).sum(1).mean())


@torch.no_grad()
def test_the_head_goes_from_the_mean_logits_to_the_mean_softmax(case):
    found = case()
    closed, _ = found.merge(fit=Fit(inputs="merged", targets="ensemble", norm="fold"))
    merged, record = found.merge(fit=Fit(**{**FIT.model_dump(exclude_unset=True), "epochs": 400}))
    x = torch.cat([batch.images for batch in found.batches])
    torch.testing.assert_close(merged.features(x), closed.features(x))  # the levels are the closed form
    goal = sum(source(x).softmax(1) for source in found.sources) / 2
    assert cross_entropy(goal, merged(x)) < cross_entropy(goal, closed(x)) - 1e-3
    left, energy = (merged(x).softmax(1) - goal).square().sum(), (goal - goal.mean(0)).square().sum()
    assert record[-1].residual == pytest.approx(float(left / energy))


@torch.no_grad()
def test_each_head_of_its_own_is_fitted_to_its_own_network(case):
    """With too few images to hold some out, what is learnt from is what is kept by."""
    found = case(labels="separate", images_of_task=4)
    merged, _ = found.merge(
        fit=Fit(
            **{**FIT.model_dump(exclude_unset=True), "ridge": 100.0, "epochs": 200, "learning_rate": 0.01}
        )
    )
    closed, _ = found.merge(fit=Fit(inputs="merged", targets="ensemble", norm="fold", ridge=100.0))
    for m, source in enumerate(found.sources):
        x = torch.cat([batch.images for batch in found.batches if batch.task == m])
        goal = source(x).softmax(1)
        before, after = (cross_entropy(goal, network(x, task="ab"[m])) for network in (closed, merged))
        assert after < before - 1e-3


@pytest.mark.parametrize("labels", ["shared", "separate"])
def test_separate_units_stay_their_own(labels, case, images):
    found = case(labels=labels)
    spec = found.sources[0].trace.spec
    merged, _ = found.merge(dict.fromkeys(spec.free, ()))
    name = merged.head.inputs[0]
    for m, source in enumerate(found.aligned):
        positions = merged.arrangement(name).positions[m]
        torch.testing.assert_close(merged.features(images(5))[:, positions], source.features(images(5)))
        if labels == "separate":
            torch.testing.assert_close(merged(images(5), task="ab"[m]), source(images(5)))
    half = {g: range(own.size // 2) for g, own in spec.free.items()}
    assert torch.isfinite(found.merge(half)[0](images(5))).all()
