"""Every alignment through the whole merge: gates, partial merges, more than two networks, and what comes behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.core.align.alignment import Alignment, view_states
from stages.core.align.order import align
from stages.core.align.solve import make_alignment
from stages.core.graph.operations import run_graph
from stages.core.merged.copies import exact_entries
from stages.core.merged.cost import built_cost, source_cost
from stages.core.merged.file import load_merged
from stages.core.recipe.methods import Fit, MatchSettings
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import images_to_batches
from stages.core.tracing.trace import trace
from stages.core.units.matching import full_split
from stages.core.units.moments import pool
from stages.fit.network import fit_network
from stages.match.matching import make_matching
from stages.recalibrate.recalibrate import recalibrate
from stages.statistics.moments import gather

WAYS = {
    "zipit": MatchSettings(by="zip", alpha=0.5, beta=0.3),
    "cca_merge": MatchSettings(by="cca", ridge=0.1),
    "ot_fusion": MatchSettings(by="transport"),
    "ot_fusion_weights": MatchSettings(by="transport", features="weights"),
    "ot_fusion_sinkhorn": MatchSettings(by="transport", regularisation=0.05),
    "partial_fusion": MatchSettings(by="partial"),
    "neuron_interpolation": MatchSettings(by="kmeans", restarts=10),
    "mudsc": MatchSettings(by="dual"),
}
COPIES = {
    "zipit": MatchSettings(by="zip", alpha=1.0, beta=0.3)
}  # a third copy is worth as much as a second one
AVERAGE = Fit(solver="average")
PROGRESSIVE = Fit(inputs="merged", targets="own", norm="fold")
FITS = {
    "average": AVERAGE,
    "pleas": Fit(),
    "progressive": PROGRESSIVE,
    "own": Fit(targets="own"),
    "regmean": Fit(solver="regmean"),
}


class Problem:
    """Sources, what was measured of them, and a merge by any way."""

    def __init__(self, sources, tasks):
        self.sources, self.batches = sources, images_to_batches(tasks, 16)
        gathered = gather(sources, self.batches, precision=torch.float64)
        self.statistics = pool(gathered, len(sources), len(sources))
        self.spec = sources[0].trace.spec

    def aligned(self, way, kept=None):
        generator = torch.Generator().manual_seed(0)
        matching, _ = make_matching(self.sources, way, self.statistics, generator)
        splits = full_split(self.spec, kept)
        alignment = make_alignment(way, self.sources, lambda: self.statistics, matching, splits)
        return matching, splits, alignment

    def merge(self, way, fit, kept=None, labels="shared"):
        matching, splits, alignment = self.aligned(way, kept)
        network, _ = fit_network(
            self.sources, matching, splits, self.batches, fit, labels=labels,
            alignment=alignment, ridge=1e-9, precision=torch.float64,
        )  # fmt: skip
        return network, align(self.sources, matching, splits), alignment


def half(spec):
    return {name: range(group.size // 2) for name, group in spec.free.items()}


@pytest.fixture
def problem(small, images, sources, calibrate):
    def make(networks=2, bias=False):
        tasks = [images(64, m) for m in range(networks)]
        own = [calibrate(small(m, bias=bias), x) for m, x in enumerate(tasks)]
        return Problem(sources(own, tasks[0]), tasks)

    return make


# -- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("way", [name for name in WAYS if name != "ot_fusion_sinkhorn"])
def test_a_permuted_copy_gives_the_network_back(way, networks, small, images, sources, copies, calibrate):
    original = small(0, bias=True)
    original.hidden.bias.data += 2  # a unit that never fires could be any other
    original = calibrate(original, images(64))
    made, _ = copies(original, images(), n=networks)
    found = Problem(sources(made, images()), [images(64, m) for m in range(networks)])
    for fit in (AVERAGE, FITS["regmean"], Fit(), PROGRESSIVE):
        merged, _, _ = found.merge(COPIES.get(way, WAYS[way]), fit)
        torch.testing.assert_close(merged(images(8, 5)), original(images(8, 5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("way", WAYS)
def test_everything_separate_is_exact(way, fit, problem, images):
    found = problem()
    merged, _, _ = found.merge(WAYS[way], FITS[fit], dict.fromkeys(found.spec.free, ()))
    name = merged.head.inputs[0]
    for source, positions in zip(found.sources, merged.arrangement(name).positions, strict=True):
        mine = source.features(images(6, 9))
        theirs = merged.features(images(6, 9))[:, positions]
        torch.testing.assert_close(theirs.sort(1).values, mine.sort(1).values)


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("way", WAYS)
def test_partial_merges_of_any_number_run_save_and_load(way, fit, networks, problem, images, tmp_path):
    found = problem(networks)
    merged, _, _ = found.merge(WAYS[way], FITS[fit], half(found.spec))
    source = found.sources[0]
    macs = built_cost(merged, "macs") / source_cost(source.trace, source.state, "shared", "macs")
    assert 1 < macs < networks
    assert torch.isfinite(merged(images(3, 8))).all()
    merged.save(tmp_path / "m.safetensors")
    assert torch.equal(load_merged(tmp_path / "m.safetensors")(images(3, 8)), merged(images(3, 8)))


# -- what an alignment does to a network ----------------------------------------------------------------------------


class Straight(nn.Module):
    """No non-linearity: any invertible alignment leaves the function alone."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        x = self.last(self.second(self.norm(self.first(x))))
        return self.fc(torch.flatten(F.avg_pool2d(x, 4), 1))


@pytest.mark.parametrize("kept", [None, half])
def test_an_aligned_network_without_non_linearities_is_the_same_function(
    kept, randomise, images, sources, calibrate
):
    tasks = [images(64, 0), images(64, 1)]
    networks = [calibrate(randomise(Straight(), m), tasks[m]) for m in (0, 1)]
    found = Problem(sources(networks, tasks[0]), tasks)
    kept = kept and kept(found.spec)
    matching, splits, alignment = found.aligned(WAYS["cca_merge"], kept)
    aligned = align(found.sources, matching, splits)
    shared = {name: len(split.shared) for name, split in splits.items()}
    view = alignment.groups["first"].views[1]
    assert (view - torch.eye(len(view))).abs().max() > 0.1  # it does something
    for network, source, state in zip(
        networks, aligned, view_states(aligned, alignment, shared), strict=True
    ):
        torch.testing.assert_close(run_graph(source.graph, state, images(5, 7)), network(images(5, 7)))


def test_a_folded_norm_says_how_far_the_mixed_units_deviate(randomise, images, sources, calibrate):
    """The scale of an aligned batch norm is the deviation of what it gives."""
    x = images(500)
    networks = [calibrate(randomise(Straight(), m), x) for m in (0, 1)]
    found = Problem(sources(networks, x), [x, x])
    matching, splits, alignment = found.aligned(WAYS["cca_merge"])
    aligned = align(found.sources, matching, splits)
    shared = {name: len(split.shared) for name, split in splits.items()}
    states = view_states(aligned, alignment, shared)
    for network, state in zip(networks, states, strict=True):
        assert state["norm.weight"].shape == network.norm.weight.shape
        twin = copy.deepcopy(network)
        twin.load_state_dict(state)
        given_off = twin.norm(twin.first(x)).transpose(0, 1).flatten(1)
        torch.testing.assert_close(given_off.std(1), state["norm.weight"].abs(), rtol=0.02, atol=0.0)


def merge_matrix(group, network):
    """M_m of ZipIt!: (k, k_m)."""
    return group.weights[network][:, None] * group.views[network]


def test_a_merged_unit_is_the_sum_of_the_merge_matrices(problem, images):
    """views, weights and unmerges of ZipIt!: column-normalised cluster indicators and the indicators themselves."""
    found = problem()
    _, _, alignment = found.aligned(WAYS["zipit"])
    for group in alignment.groups.values():
        whole = torch.cat([merge_matrix(group, m) for m in range(2)], 1)  # (k, 2 k)
        indicator = torch.cat(group.unmerges, 0)  # (2 k, k)
        assert set(indicator.unique().tolist()) == {0.0, 1.0}
        assert (indicator.sum(1) == 1).all()
        torch.testing.assert_close(whole, indicator.T / indicator.sum(0)[:, None])
        torch.testing.assert_close(group.weights.sum(0), torch.ones(len(whole)).double())


def test_averaging_is_the_sum_of_merge_weight_unmerge(images, sources):
    """W = sum_m M_m W_m U_m, with biases, where there is no norm layer."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    tasks = [torch.randn(64, 3).double() for _ in range(2)]
    networks = [Linear().double() for _ in range(2)]
    found = Problem(sources(networks, tasks[0]), tasks)
    for way in WAYS.values():
        merged, aligned, alignment = found.merge(way, AVERAGE)
        k = 5
        identity = [torch.eye(k).double()] * 2
        groups = alignment.groups
        merges = {
            g: [merge_matrix(groups[g], m) for m in range(2)] if g in groups else [i / 2 for i in identity]
            for g in "ab"
        }
        unmerges = {g: groups[g].unmerges if g in groups else identity for g in "ab"}
        state = [source.state for source in aligned]
        weight = sum(merges["b"][m] @ state[m]["b.weight"] @ unmerges["a"][m] for m in range(2))
        bias = sum(merges["b"][m] @ state[m]["b.bias"] for m in range(2))
        node = next(n for n in merged.trace.graph.nodes if n.parameters.get("weight") == "b.weight")
        torch.testing.assert_close(merged.map_of(node).weights[0].data, weight)
        torch.testing.assert_close(merged.map_of(node).bias.data, bias)


@pytest.mark.parametrize("way", ["zipit", "cca_merge", "ot_fusion"])
@pytest.mark.parametrize(
    ("inside", "operation"),
    [
        (lambda: nn.GroupNorm(1, 4), "group_norm"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), "conv2d"),
        (lambda: nn.InstanceNorm2d(4, affine=True), "group_norm"),
    ],
)
def test_layers_that_mixing_cannot_pass_are_refused(way, inside, operation, images, sources, randomise):
    tasks = [images(16, m) for m in range(2)]
    own = [
        nn.Sequential(nn.Conv2d(2, 4, 3), inside(), nn.ReLU(), nn.Conv2d(4, 3, 6), nn.Flatten())
        for _ in tasks
    ]
    found = Problem(sources([randomise(n, m) for m, n in enumerate(own)], tasks[0]), tasks)
    message = f"{operation} works on single units of group .*; allowed: a matching that is a permutation"
    with pytest.raises(InputError, match=message):
        found.merge(WAYS[way], AVERAGE)


def test_an_alignment_of_nothing_leaves_values_as_they_are():
    alignment = Alignment(2)
    assert not alignment.groups
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    layout = trace(network, torch.zeros(1, 3)).layouts
    layout = list(layout.values())[1]
    assert not alignment.touches(layout)
    value = torch.randn(2, 4)
    assert alignment.view(value, layout, 1, {"0": 4}, 0) is value


# -- recalibration --------------------------------------------------------------------------------------------------


def unit_statistics(values):
    rows = values.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.std(1, unbiased=False)


def watched(merged, x, task=None):
    """What the merged network's batch norms and linear maps give, by node."""
    values, run = {}, merged._on_pieces

    def look(node, inputs, index):
        pieces = run(node, inputs, index)
        values[node.name] = merged._joined(node.name, pieces)
        return pieces

    merged._on_pieces = look
    merged(x, task)
    del merged._on_pieces
    return values


def source_values(source, x):
    values = {source.graph.nodes[0].name: x}
    for node in source.graph.nodes[1:]:
        values[node.name] = source.run_node(node, [values[name] for name in node.inputs])
    return values


@pytest.mark.parametrize("kept", [None, half])
@pytest.mark.parametrize("way", ["zipit", "cca_merge", "ot_fusion_sinkhorn", "mudsc"])
def test_repair_restores_mean_and_deviation(way, kept, problem):
    found = problem(bias=True)
    merged, aligned, alignment = found.merge(WAYS[way], AVERAGE, kept and kept(found.spec))
    recalibrate(merged, "repair", found.batches, aligned, alignment)
    x = torch.cat([batch.images for batch in found.batches])
    own = [torch.cat([b.images for b in found.batches if b.task == m]) for m in range(len(aligned))]
    theirs, trace_ = [source_values(s, y) for s, y in zip(aligned, own, strict=True)], merged.trace
    exact = exact_entries(merged)  # copies of a source's units keep what they have
    mine, behind = watched(merged, x), {"bn1", "bn2", "bn3", "conv4", "hidden"}
    for node in trace_.graph.nodes:
        if node.name not in behind:
            continue
        layout, parts = trace_.layouts[node.name], merged.arrangement(node.name)
        shares = alignment.shares(layout, merged.shared, x)
        goal = torch.zeros(2, parts.width).double()
        for m, values in enumerate(theirs):
            view = alignment.view(values[node.name], layout, layout.dim, merged.shared, m)
            goal[:, parts.positions[m]] += torch.stack(unit_statistics(view)) * shares[m]
        seen = torch.stack(unit_statistics(mine[node.name]))
        alive = (seen[1] > 1e-6 * goal[1]) & ~exact[node.name]
        torch.testing.assert_close(seen[:, alive], goal[:, alive], rtol=1e-6, atol=1e-6)


def test_repair_of_a_network_without_norm_layers_is_folded_into_its_weights(images, sources):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    networks = [Bare().double() for _ in range(2)]
    tasks = [images(64, m) for m in range(2)]
    found = Problem(sources(networks, tasks[0]), tasks)
    way = MatchSettings(by="activations")
    merged, aligned, alignment = found.merge(way, AVERAGE)
    before = {name: list(t.shape) for name, t in merged.state_dict().items()}
    collapsed = unit_statistics(watched(merged, torch.cat(tasks))["b"])[1]
    recalibrate(merged, "repair", found.batches, aligned, alignment)
    assert {name: list(t.shape) for name, t in merged.state_dict().items()} == before
    values = [source_values(source, x)["b"] for source, x in zip(aligned, tasks, strict=True)]
    goal = sum(torch.stack(unit_statistics(v)) for v in values) / 2
    seen = torch.stack(unit_statistics(watched(merged, torch.cat(tasks))["b"]))
    torch.testing.assert_close(seen, goal)
    assert (collapsed < goal[1]).all()  # averaging shrinks deviations: what REPAIR is for


@pytest.mark.parametrize("labels", ["shared", "separate"])
@pytest.mark.parametrize("way", ["zipit", "mudsc"])
def test_tact_gives_each_task_the_statistics_of_its_own_network(
    way, labels, small, images, sources, calibrate, tmp_path
):
    tasks = [images(64, m) for m in range(2)]
    own = [
        calibrate(small(m, classes=3 + m * (labels == "separate"), bias=True), x) for m, x in enumerate(tasks)
    ]
    found = Problem(sources(own, tasks[0], labels), tasks)
    merged, aligned, alignment = found.merge(WAYS[way], AVERAGE, labels=labels)
    recalibrate(merged, "tact", found.batches, aligned, alignment)
    for task, (x, source) in enumerate(zip(tasks, aligned, strict=True)):
        mine, theirs = watched(merged, x, "ab"[task]), source_values(source, x)
        for name in ("bn1", "bn3", "conv4", "hidden"):
            layout = merged.trace.layouts[name]
            shares = alignment.shares(layout, merged.shared, x)
            has_part = shares[task] > 0
            goal = alignment.view(theirs[name], layout, layout.dim, merged.shared, task)
            goal, seen = (torch.stack(unit_statistics(v)) for v in (goal, mine[name]))
            kept = has_part & (seen[1] > 1e-6 * goal[1])
            torch.testing.assert_close(seen[:, kept], goal[:, kept], rtol=1e-6, atol=1e-6)
    merged.save(tmp_path / "m.safetensors")
    again, x = load_merged(tmp_path / "m.safetensors"), images(4, 9)
    for task in "ab":
        assert torch.equal(again(x, task), merged(x, task))
        assert torch.equal(again.features(x, task), merged.features(x, task))
    assert not torch.equal(merged.features(x, "a"), merged.features(x, "b"))
    if labels == "separate":
        assert torch.equal(again(x), torch.cat([again(x, "a"), again(x, "b")], 1))
    else:
        with pytest.raises(ValueError, match="task: found None; allowed: a, b"):
            again(x)


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_recalibration_leaves_everything_separate_alone(seed):
    torch.manual_seed(seed)
    tasks = [torch.randn(32, 2, 6, 6).double() for _ in range(2)]
    networks = [
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
        .double()
        .eval()
        for _ in range(2)
    ]
    from stages.core.graph.source import Task
    from stages.core.tracing.sources import make_sources

    made = make_sources(networks, [Task(n, ("0", "1")) for n in "ab"], tasks[0], "shared")
    found = Problem(made, tasks)
    for way in ("batchnorm", "repair", "tact"):
        merged, aligned, alignment = found.merge(
            WAYS["cca_merge"], AVERAGE, dict.fromkeys(found.spec.free, ())
        )
        before = merged.features(tasks[0])
        recalibrate(merged, way, found.batches, aligned, alignment)
        after = merged.features(tasks[0], "a") if way == "tact" else merged.features(tasks[0])
        torch.testing.assert_close(after, before)
