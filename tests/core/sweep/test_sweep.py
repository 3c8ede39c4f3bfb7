from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live
from torch import nn

from stages.core.align.alignment import Alignment
from stages.core.graph.source import Source
from stages.core.merged.network import MergedNetwork
from stages.core.networks.architectures import build
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError
from stages.core.sweep import sweep as engine
from stages.core.sweep.batches import Batch, images_to_batches, task_counts, task_weights
from stages.core.sweep.memory import check_memory, peak_bytes
from stages.core.sweep.sweep import Sweep
from stages.core.units.matching import full_split, identity_matching
from stages.fit.average import fill_average
from stages.fit.network import fit_network
from stages.fit.setup import Setup
from stages.fit.visitor import FitVisitor
from stages.statistics.moments import gather


class Looker:
    """Sees all nodes of some operations and checks what it is shown."""

    def __init__(self, operations=(), see=lambda node, sweep: None):
        self.operations, self.see = operations, see

    def wants(self, node):
        return node.operation in self.operations

    def visit(self, node, sweep):
        self.see(node, sweep)

    def extra_bytes(self, node, images, batch):
        return 0

    def kept_bytes(self, node, images):
        return 0


@pytest.fixture
def pair(small, images, sources):
    return sources([small(0), small(1)], images())


def average_network(sources, shared=None):
    spec = sources[0].trace.spec
    sizes = {name: group.size for name, group in spec.free.items()} if shared is None else shared
    network = MergedNetwork(sources[0].trace, [s.task for s in sources], "shared", sizes)
    network.to(next(iter(sources[0].state.values())).dtype)
    fill_average(network, sources, Alignment(len(sources)))
    return network


def all_values(network, graph, x):
    values = {graph.nodes[0].name: x}
    for node in graph.nodes[1:]:
        values[node.name] = network.run_node(node, [values[name] for name in node.inputs])
    return values


# -- what a visitor sees ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_visitor_sees_inputs_and_outputs_of_every_network(pair, images):
    batches = images_to_batches([images(5, 0), images(3, 1)], 2)
    merged, seen = average_network(pair), []
    expected = [
        [all_values(network, pair[0].graph, batch.images) for batch in batches] for network in (*pair, merged)
    ]

    def see(node, sweep):
        seen.append(node.name)
        for index in range(len(batches)):
            for name in node.inputs:
                torch.testing.assert_close(sweep.of_merged(name, index), expected[-1][index][name])
            for m in range(2):
                for name in (*node.inputs, node.name):
                    torch.testing.assert_close(sweep.source(m, name, index), expected[m][index][name])

    operations = {node.operation for node in pair[0].graph.nodes}
    Sweep(pair, batches, merged).run(Looker(operations, see))
    assert seen == [node.name for node in pair[0].graph.nodes[1:]]


@torch.no_grad()
def test_the_merged_network_runs_a_node_with_the_weights_its_visit_leaves(pair, images):
    merged, batches = average_network(pair), images_to_batches([images(4, 0)], 2)
    found = []

    def see(node, sweep):
        if node.name == "conv1":
            merged.map_of(node).weights[0].zero_()
        elif node.operation == "batch_norm":
            found.append(sweep.of_merged(node.inputs[0], 0).abs().max())

    Sweep(pair, batches, merged).run(Looker(("conv2d", "batch_norm"), see))
    assert found[0] == 0


@torch.no_grad()
def test_a_merged_network_can_be_swept_alone(pair, images):
    merged, seen = average_network(pair), []
    Sweep([], [Batch(images(), 0)], merged).run(
        Looker(("linear",), lambda node, sweep: seen.append(sweep.of_merged(node.inputs[0], 0)))
    )
    torch.testing.assert_close(seen[-1], merged.features(images()))


# -- one pass -----------------------------------------------------------------------------------------------------


def counted_images(monkeypatch):
    """How many images each network took through each of its linear nodes."""
    counts = Counter()
    for kind in (Source, MergedNetwork):
        run = kind.run_node

        def counting(self, node, inputs, *task, run=run):
            if node.linear:
                counts[id(self), node.name] += len(inputs[0])
            return run(self, node, inputs, *task)

        monkeypatch.setattr(kind, "run_node", counting)
    return counts


@pytest.mark.parametrize("fit", [Fit(), Fit(inputs="merged", targets="own", norm="fold"),
                                 Fit(solver="adam", inputs="merged", steps=2)])  # fmt: skip
@pytest.mark.parametrize("depth", [8, 20])
def test_every_image_passes_every_layer_once_whatever_the_depth(depth, fit, randomise, sources, monkeypatch):
    tasks = [torch.randn(6, 3, 8, 8).double(), torch.randn(4, 3, 8, 8).double()]
    networks = [
        randomise(build("resnet", {"depth": depth, "width": 2, "classes": 3}), seed) for seed in (0, 1)
    ]
    made = sources(networks, tasks[0][:2])
    spec = made[0].trace.spec
    split = full_split(spec, {name: range(group.size // 2) for name, group in spec.free.items()})
    counts = counted_images(monkeypatch)
    batches = images_to_batches(tasks, 4)
    fit_network(made, identity_matching(spec, 2), split, batches, fit, labels="shared")
    assert set(counts.values()) == {10}
    assert len(counts) == (depth + 2) * (3 if fit.inputs == "merged" else 2)


# -- memory -------------------------------------------------------------------------------------------------------


def measured(sources, batches, merged, looker, precision):
    """Bytes at the worst moment, the images included."""
    sweep = Sweep(sources, batches, merged, precision)
    with Live() as live:
        sweep.run(looker)
    return live.peak + sum(batch.images.nbytes for batch in batches)


def predicted(sources, batches, merged, looker, itemsize):
    precision = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    return peak_bytes(Sweep(sources, batches, merged, precision), looker)


@pytest.mark.parametrize("watched", [(), ("conv2d", "linear"), ("batch_norm",), ("add", "concatenate")])
@given(seed=st.integers(0, 1000), alone=st.booleans())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_no_more_is_held_than_was_predicted_and_not_much_less(
    small, images, sources, splits, watched, seed, alone
):
    made = sources([small(0), small(1)], images())
    shared = {name: len(split.shared) for name, split in splits(made[0].trace.spec, seed).items()}
    merged = None if alone else average_network(made, shared)
    batches = [Batch(image[None], 0) for image in images(30)]
    found = measured(made, batches, merged, Looker(watched), torch.float64)
    promised = predicted(made, batches, merged, Looker(watched), 8)
    one = promised / 30  # what a single batch holds on its way through a node
    assert found <= promised + 2 * one
    assert found >= 0.75 * promised


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_values_take_the_memory_of_their_precision(small, images, sources, precision):
    made = sources([small(0), small(1)], images())
    batches = [Batch(image[None], 0) for image in images(30)]
    itself = sum(batch.images.nbytes for batch in batches)
    wide, narrow = (measured(made, batches, None, Looker(), s) - itself for s in (torch.float64, precision))
    assert narrow < 1.15 * wide * precision.itemsize / 8


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_images_are_counted_in_their_own_type(randomise, sources, precision):
    x = torch.randn(400, 8, 6, 6).double()  # eight channels in, one out: the images are most of what is held
    made = sources([randomise(nn.Sequential(nn.Conv2d(8, 1, 1), nn.ReLU()), m) for m in (0, 1)], x)
    batches = images_to_batches([x], 10)
    found = measured(made, batches, None, Looker(), precision)
    with pytest.raises(InputError, match="statistics: needs"):
        gather(made, batches, precision=precision, memory=0.9 * found / 2**30)


@pytest.mark.parametrize(
    "fit",
    [
        Fit(),
        Fit(inputs="merged", norm="fold"),
        Fit(solver="regmean"),
        Fit(solver="adam", steps=2),
        Fit(solver="adam", inputs="merged", steps=2),
    ],
)
@pytest.mark.parametrize("maps", [True, False])
def test_a_fit_holds_no_more_than_was_predicted(small, images, sources, splits, fit, maps, monkeypatch):
    monkeypatch.setattr("stages.fit.layer.worthwhile", lambda plan, c: maps)
    monkeypatch.setattr("stages.fit.layer.ROW_ENTRIES", 2**12)
    made = sources([small(0).float(), small(1).float()], images().float())
    shared = {name: len(split.shared) for name, split in splits(made[0].trace.spec, 1).items()}
    network = average_network(made, shared)
    merged = network if fit.inputs == "merged" else None
    batches = images_to_batches([images(100, task).float() for task in (0, 1)], 10)
    fitter = FitVisitor(Setup(network, made, fit))
    found = measured(made, batches, merged, fitter, torch.float32)
    promised = predicted(made, batches, merged, fitter, 4)
    assert found <= promised * (1 + 2 / len(batches))


def test_values_are_freed_so_that_depth_costs_nothing(randomise, sources):
    x, peaks = torch.randn(20, 3, 8, 8).double(), []
    for depth in (8, 20):
        network = [randomise(build("resnet", {"depth": depth, "width": 4, "classes": 3}), s) for s in (0, 1)]
        made = sources(network, x)
        batches = images_to_batches([x], 1)
        peaks.append(measured(made, batches, None, Looker(("conv2d",)), torch.float64))
        assert predicted(made, batches, None, Looker(("conv2d",)), 8) >= 0.98 * peaks[-1]
    assert peaks[1] <= 1.02 * peaks[0]


def test_nothing_but_the_output_is_left_after_a_sweep(pair, images):
    batches = images_to_batches([images(6)], 2)
    sweep = Sweep(pair, batches)
    with Live() as live:
        sweep.run(Looker())
        assert live.now() == 2 * 6 * 3 * 8
    assert all(torch.isfinite(batch.images).all() for batch in batches)


# -- precision ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_fit_with_narrow_precision_comes_close(pair, images, precision, tolerance):
    spec = pair[0].trace.spec
    batches = images_to_batches([images(40, 0), images(40, 1)], 10)
    fit = Fit(inputs="merged", targets="own", norm="fold")
    found = [
        fit_network(
            pair, identity_matching(spec, 2), full_split(spec), batches, fit, labels="shared", precision=s
        )[0]
        for s in (torch.float64, precision)
    ]
    expected = found[0](images(20, 5))
    error = (found[1](images(20, 5)) - expected).norm() / expected.norm()
    assert 0 < error < tolerance


def test_values_are_read_back_in_the_type_of_the_images(pair, images):
    kinds = set()
    look = Looker(("linear",), lambda node, sweep: kinds.add(sweep.source(0, node.inputs[0], 0).dtype))
    Sweep(pair, [Batch(images(), 0)], None, torch.bfloat16).run(look)
    assert kinds == {torch.float64}


# -- batches and refusals -----------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), size=st.integers(1, 8))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_batches_hold_every_image_once_each_of_one_task(sizes, size):
    tasks = [torch.randn(n, 1, 2, 2) for n in sizes]
    batches = images_to_batches(tasks, size)
    for task, own in enumerate(tasks):
        assert torch.equal(torch.cat([b.images for b in batches if b.task == task]), own)
    assert all(len(batch.images) <= size for batch in batches)
    weights = task_weights(task_counts(batches))
    totals = [weights[task] * n for task, n in enumerate(sizes)]
    assert totals == pytest.approx([sum(sizes) / len(sizes)] * len(sizes))


@pytest.mark.parametrize("inputs", ["source", "merged"])
def test_batches_are_bounded_once_for_the_prediction_and_the_sweep(pair, images, monkeypatch, inputs):
    spec, calls = pair[0].trace.spec, []
    bound = engine.bounded
    monkeypatch.setattr(engine, "bounded", lambda *arguments: calls.append(1) or bound(*arguments))
    batches = images_to_batches([images(6, 0), images(6, 1)], 4)
    fit_network(
        pair, identity_matching(spec, 2), full_split(spec), batches, Fit(inputs=inputs), labels="shared"
    )
    assert len(calls) == 1


def test_what_does_not_fit_is_refused_in_one_line():
    cpu = torch.device("cpu")
    check_memory(2**30, 1.0, cpu, "fit")
    with pytest.raises(InputError) as error:
        check_memory(2**30 + 2**29, 1.0, cpu, "fit")
    assert str(error.value).startswith("fit: needs 1.50 GiB, there are 1.00 GiB; allowed: fewer images")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"statistics: needs 1048576.00 GiB"):
        check_memory(2**50, None, cpu, "statistics")
