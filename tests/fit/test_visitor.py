import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.core.align.order import align
from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import Batch, images_to_batches
from stages.core.sweep.rows import input_rows, kernel_of
from stages.core.units.matching import full_split, identity_matching
from stages.fit.equations.normal import NormalEquations
from stages.fit.network import fit_network
from stages.fit.setup import Setup
from stages.fit.visitor import FitVisitor
from stages.recalibrate.batchnorm import recompute_statistics

CHOICES = list(itertools.product(["source", "merged"], ["ensemble", "own"]))
EXACT = [Fit(inputs=i, targets=t, norm=n) for i, t in CHOICES for n in ("average", "fold")]
ADAM = [Fit(solver="adam", inputs=i, targets=t, steps=4) for i, t in CHOICES]
BATCH_NORM_MERGED = [fit for fit in EXACT if fit.inputs == "merged"]


def name(fit):
    return f"{fit.solver}-{fit.inputs}-{fit.targets}-{fit.norm}"


def merge(sources, matching, split, batches, fit, **settings):
    return fit_network(
        sources,
        matching,
        split,
        batches,
        fit,
        **{"labels": "shared", "ridge": 0.0, "precision": torch.float64, **settings},
    )


def close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- gates: a copy, everything separate ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(small, images, copies, calibrate, sources):
    """A network and two permuted copies; its statistics are those of the images it is merged on."""
    batches = images_to_batches([images(30, task) for task in range(3)], 20)
    network = calibrate(small(0), torch.cat([batch.images for batch in batches]))
    networks, matching = copies(network, images(), 3)
    return network, sources(networks, images()), matching, batches


@torch.no_grad()
@pytest.mark.parametrize("fit", EXACT, ids=name)
def test_a_network_merged_with_permuted_copies_is_given_back(copied, images, fit):
    network, made, matching, batches = copied
    merged, record = merge(made, matching, full_split(made[0].trace.spec), batches, fit)
    close(merged(images(9, seed=9)), network(images(9, seed=9)), 1e-7)
    assert all(line.residual < 1e-12 for line in record)
    for node in merged.trace.graph.nodes:
        if node.linear and fit.norm == "average":
            weight = network.state_dict()[node.parameters["weight"]]
            close(merged.map_of(node).weights[0], weight, 1e-7)


@torch.no_grad()
@pytest.mark.parametrize("fit", EXACT, ids=name)
def test_the_ridge_holds_to_what_the_average_computes(copied, images, fit):
    """A copy is its own average, so no ridge may move it, however the batch norm is treated."""
    network, made, matching, batches = copied
    merged, _ = merge(made, matching, full_split(made[0].trace.spec), batches, fit, ridge=0.1)
    close(merged(images(9, seed=9)), network(images(9, seed=9)), 1e-7)


@torch.no_grad()
@pytest.mark.parametrize("labels", ["shared", "separate"])
@pytest.mark.parametrize("fit", EXACT + ADAM, ids=name)
def test_everything_separate_keeps_the_features_exactly(small, images, sources, fit, labels):
    classes = [3, 3, 3] if labels == "shared" else [2, 3, 4]
    networks = [small(m, n) for m, n in enumerate(classes)]
    made = sources(networks, images(), labels)
    spec = made[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    batches = images_to_batches([images(6, task) for task in range(3)], 4)
    matching = identity_matching(spec, 3)
    merged, record = merge(made, matching, split, batches, fit, labels=labels, ridge=1e-3)
    features = merged.features(images())
    for network, positions in zip(networks, merged.arrangement("relu_4").positions, strict=True):
        own = []
        network.fc.register_forward_pre_hook(lambda module, inputs, own=own: own.append(inputs[0]))
        logits = network(images())
        close(features[:, positions], own[0], 1e-12)
        if labels == "separate":
            task = merged.tasks[networks.index(network)].name
            close(merged(images(), task=task), logits, 1e-12)
    assert [line.layer for line in record] == (["fc"] if labels == "shared" else [])


# -- every layer is at its optimum --------------------------------------------------------------------------------


def all_values(network, graph, x):
    """Every node's value."""
    values = {graph.nodes[0].name: x}
    for node in graph.nodes[1:]:
        values[node.name] = network.run_node(node, [values[i] for i in node.inputs])
    return values


def assembled(values, parts, dim, task, targets):
    """The sources' values in merged order: separate entries their own, shared ones the owner's or the mean."""
    shape = list(values[0].shape)
    shape[dim] = parts.width
    result = torch.zeros(shape, dtype=torch.float64)
    mean = sum(values) / len(values)
    for m, positions in enumerate(parts.positions):
        for entry, position in enumerate(positions.tolist()):
            shared = parts.owner[position] < 0
            value = values[m] if not shared else values[task] if targets == "own" else mean
            result.select(dim, position).copy_(value.select(dim, entry))
    return result


def rows_of(node, y):
    return y.movedim(1, -1).flatten(0, -2) if node.operation == "conv2d" else y


def weights_of(batches):
    """Every task weighs the same."""
    counts = [sum(len(b.images) for b in batches if b.task == task) for task in range(len(batches))]
    return [1.0 / counts[batch.task] for batch in batches]


def gaps(merged, aligned, batches, fit, node, norm):
    """Relative gradient of each block's objective at the weights that were installed, the intercept free."""
    module, fold = merged.map_of(node), norm is not None and fit.norm == "fold"
    z, errors, w, targets = [], [], [], []
    for batch, weight in zip(batches, weights_of(batches), strict=True):
        own = [all_values(s, s.graph, batch.images) for s in aligned]
        inputs = node.inputs[0]
        read = all_values(merged, merged.trace.graph, batch.images)[inputs]
        if fit.inputs == "source":
            parts = merged.arrangement(inputs)
            read = assembled([v[inputs] for v in own], parts, 1, batch.task, fit.targets)
        out = module(read)
        out = merged.run_node(norm, [out]) if fold else out
        parts = merged.arrangement(node.name)
        y = assembled([v[(norm if fold else node).name] for v in own], parts, 1, batch.task, fit.targets)
        z.append(input_rows(node, read, kernel_of(module.weights[0])))
        errors.append(rows_of(node, out - y))
        targets.append(rows_of(node, y))
        w.append(torch.full((len(z[-1]),), weight).double())
    z, error, w, y = torch.cat(z), torch.cat(errors), torch.cat(w)[:, None], torch.cat(targets)
    offset = (w * error).sum(0) / w.sum()
    if fold or module.bias is not None:
        close(offset, torch.zeros_like(offset), 1e-7)
    error, taps = error - offset, z.shape[1] // module.inputs.width
    for block in module.blocks:
        columns = (block.columns[:, None] * taps + torch.arange(taps)).flatten()
        gradient = (w * error[:, block.start : block.stop]).T @ z[:, columns]
        target = (w * y[:, block.start : block.stop].square()).sum(0).sqrt()
        scale = target[:, None] * (w * z[:, columns].square()).sum(0).max().sqrt()
        kept = ~exact_entries(merged)[node.name][block.start : block.stop]
        yield gradient[kept], scale[kept].expand_as(gradient[kept])


@pytest.mark.parametrize("fit", EXACT, ids=name)
@given(seed=st.integers(0, 1000), networks=st.integers(2, 3), bias=st.booleans())
@settings(max_examples=3, deadline=None, derandomize=True)
@torch.no_grad()
def test_no_change_of_any_layer_makes_it_fit_better(
    small, images, sources, splits, fit, seed, networks, bias
):
    made = sources([small(seed + m, bias=bias) for m in range(networks)], images())
    spec = made[0].trace.spec
    matching, split = identity_matching(spec, networks), splits(spec, seed)
    batches = images_to_batches([images(24 + 4 * task, task) for task in range(networks)], 20)
    merged, record = merge(made, matching, split, batches, fit)
    aligned, nodes = align(made, matching, split), merged.trace.graph.nodes
    for node in nodes:
        if not node.linear:
            continue
        norm = next((n for n in nodes if n.operation == "batch_norm" and n.inputs == (node.name,)), None)
        for gradient, scale in gaps(merged, aligned, batches, fit, node, norm):
            assert (gradient.abs() <= 1e-6 * scale).all(), node.name  # the cut of the pseudo-inverse
    assert all(0 <= line.residual <= 1 + 1e-9 for line in record)


@torch.no_grad()
@pytest.mark.parametrize("fit", [f for f in EXACT if f.inputs == "merged" and f.norm == "average"], ids=name)
def test_batch_norm_gets_the_exact_statistics_of_what_it_reads(small, images, sources, splits, fit):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    batches = images_to_batches([images(20, 0), images(20, 1)], 8)
    merged, _ = merge(made, identity_matching(spec, 2), splits(spec, 1), batches, fit)
    values = all_values(merged, merged.trace.graph, torch.cat([batch.images for batch in batches]))
    for node in merged.trace.graph.nodes:
        if node.operation == "batch_norm":
            x = values[node.inputs[0]].transpose(0, 1).flatten(1)
            fitted = ~exact_entries(merged)[node.name]
            close(merged.map_of(node).running_mean[fitted], x.mean(1)[fitted])
            close(merged.map_of(node).running_var[fitted], x.var(1, unbiased=False)[fitted])


@torch.no_grad()
@pytest.mark.parametrize("fit", [f for f in EXACT if f.norm == "fold"] + BATCH_NORM_MERGED[:1], ids=name)
def test_recomputing_the_statistics_on_the_same_images_changes_nothing(small, images, sources, splits, fit):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    batches = images_to_batches([images(24, 0), images(16, 1)], 8)
    merged, _ = merge(made, identity_matching(spec, 2), splits(spec, 1), batches, fit)
    before = merged(images(5, seed=7))
    if fit.inputs == "source":  # its batch norms were set for the sources' features
        recompute_statistics(merged, batches)
        assert (merged(images(5, seed=7)) - before).abs().max() > 1e-6
        before = merged(images(5, seed=7))
    recompute_statistics(merged, batches)
    close(merged(images(5, seed=7)), before, 1e-9)


# -- one layer at a time, against references ----------------------------------------------------------------------


def lstsq(z, y, start, penalty, w, intercept):
    """min sum w |W z + b - y|^2 + penalty |W - start|^2, as rows under rows."""
    one = torch.ones(len(z), 1).double() * float(intercept)
    ridge = torch.cat([torch.eye(z.shape[1]), torch.zeros(z.shape[1], 1)], 1).double() * penalty**0.5
    design = torch.cat([torch.cat([z, one], 1) * w[:, None].sqrt(), ridge])
    target = torch.cat([y * w[:, None].sqrt(), start.T * penalty**0.5])
    solution = torch.linalg.lstsq(design, target, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


def patches(x, conv):
    """Every patch a convolution reads, by slicing: (images * places, channels * taps)."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    x = F.pad(x, (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]))
    rows = []
    for image in x:
        for i in range(0, x.shape[2] - dh * (kh - 1), sh):
            for j in range(0, x.shape[3] - dw * (kw - 1), sw):
                rows.append(image[:, i : i + dh * kh : dh, j : j + dw * kw : dw].flatten())
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(1, 1, 0, 1), (3, 1, 1, 1), ((3, 2), (2, 1), (1, 0), 1), (3, 2, 2, (1, 2)), (1, 2, 1, 1)],
)
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_convolution_is_the_least_squares_fit_on_its_patches(
    images, sources, randomise, kernel, stride, padding, dilation, bias, ridge
):
    networks = [
        randomise(nn.Sequential(nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=bias)), m)
        for m in (0, 1)
    ]
    made = sources(networks, images())
    batches = [Batch(images(4, 0), 0), Batch(images(3, 1), 1), Batch(images(3, 2), 1)]
    fit = Fit(inputs="source", targets="own")
    merged, _ = merge(made, identity_matching(made[0].trace.spec, 2), {}, batches, fit, ridge=ridge)
    z = torch.cat([patches(batch.images, networks[0][0]) for batch in batches])
    y = torch.cat([rows_of(merged.head or made[0].graph.output, networks[b.task](b.images)) for b in batches])
    rows = [len(patches(batch.images[:1], networks[0][0])) * len(batch.images) for batch in batches]
    w = torch.cat(
        [torch.full((n,), {0: 10 / 8, 1: 10 / 12}[b.task]) for n, b in zip(rows, batches, strict=True)]
    )
    w = w.double()
    start = sum(network[0].weight.flatten(1) for network in networks) / 2
    middle = (w[:, None] * z).sum(0) / w.sum() if bias else 0.0
    penalty = float(ridge * (w[:, None] * (z - middle).square()).sum(0).mean())
    weight, b = lstsq(z, y, start, penalty, w, bias)
    module = merged.map_of(made[0].graph.output)
    close(module.weights[0].flatten(1), weight)
    if bias:
        close(module.bias, b)


def mlp(randomise, seed, classes=3):
    return randomise(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, classes)), seed
    )


def vectors(n, seed):
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_source_inputs_and_own_targets_without_alignment_are_regmean(randomise, sources, ridge):
    networks = [mlp(randomise, m) for m in range(3)]
    tasks = [vectors(n, m) for m, n in enumerate((40, 25, 30))]
    made = sources(networks, tasks[0])
    spec = made[0].trace.spec
    fit = Fit(inputs="source", targets="own")
    merged, _ = merge(
        made, identity_matching(spec, 3), full_split(spec), images_to_batches(tasks, 16), fit, ridge=ridge
    )
    for layer in (0, 2, 4):
        z = [network[:layer](x) for network, x in zip(networks, tasks, strict=True)]
        W = [torch.cat([n[layer].weight, n[layer].bias[:, None]], 1) for n in networks]
        z1 = [torch.cat([own, torch.ones(len(own), 1)], 1) for own in z]
        w = [95 / (3 * len(own)) for own in z]
        G = [weight * own.T @ own for weight, own in zip(w, z1, strict=True)]
        right = sum(g @ own.T for g, own in zip(G, W, strict=True))
        rows = torch.cat(z)
        each = torch.cat([torch.full((len(own),), weight) for own, weight in zip(z, w, strict=True)]).double()
        centred = rows - (each[:, None] * rows).sum(0) / each.sum()
        penalty = ridge * (each[:, None] * centred.square()).sum(0).mean()
        hold = penalty * torch.diag(torch.tensor([1.0] * rows.shape[1] + [0.0])).double()
        right = right + hold @ (sum(W) / 3).T
        expected = torch.linalg.solve(sum(G) + hold, right).T
        module = merged.map_of(merged.trace.graph.nodes[layer + 1])
        close(torch.cat([module.weights[0], module.bias[:, None]], 1), expected)


@torch.no_grad()
def test_progressive_is_least_squares_on_the_features_as_built_so_far(randomise, sources):
    networks = [mlp(randomise, m) for m in range(2)]
    tasks = [vectors(60, m) for m in range(2)]
    made = sources(networks, tasks[0])
    split = full_split(made[0].trace.spec, {"0": (0, 1, 3), "2": (1, 4)})
    matching = identity_matching(made[0].trace.spec, 2)
    fit = Fit(inputs="merged", targets="own")
    merged, _ = merge(made, matching, split, images_to_batches(tasks, 32), fit)
    x, owner = torch.cat(tasks), torch.arange(2).repeat_interleave(60)
    orders = [
        [2, 4, 0, 1, 3],
        [0, 2, 3, 5, 1, 4],
    ]  # separate of the first, shared; then separate of the second
    counts, z, read = [2, 4], x, [torch.arange(4)] * 2
    for layer, order, s in zip((0, 2), orders, counts, strict=True):
        own = [network[: layer + 1](x) for network in networks]
        shared = torch.where(owner[:, None] == 0, own[0], own[1])[:, order[s:]]
        w = torch.ones(len(x)).double()
        d = [torch.zeros(1, z.shape[1]).double(), torch.zeros(1, len(read[0])).double()]
        parts = []
        for target, columns, start in [
            (own[0][:, order[:s]], read[0], d[1]),
            (shared, torch.arange(z.shape[1]), d[0]),
            (own[1][:, order[:s]], read[1], d[1]),
        ]:
            W, b = lstsq(z[:, columns], target, start.expand(target.shape[1], -1), 0.0, w, True)
            parts.append(z[:, columns] @ W.T + b)
        z = torch.cat(parts, 1).relu()
        read = [torch.arange(len(order)), torch.arange(s, len(order) + s)]
    close(merged.features(x), z, 1e-7)
    y = torch.where(owner[:, None] == 0, networks[0](x), networks[1](x))
    W, b = lstsq(z, y, torch.zeros(3, z.shape[1]).double(), 0.0, torch.ones(len(x)).double(), True)
    close(merged(x), z @ W.T + b, 1e-7)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["ensemble", "own"])
@pytest.mark.parametrize("inputs", ["source", "merged"])
def test_heads_of_separate_label_spaces_are_fitted_on_their_own_rows(randomise, sources, inputs, targets):
    classes = [2, 4]
    networks = [mlp(randomise, m, n) for m, n in enumerate(classes)]
    tasks = [vectors(50, 0), vectors(30, 1)]
    made = sources(networks, tasks[0], "separate")
    spec = made[0].trace.spec
    split = full_split(spec, {"0": (0, 2), "2": (0, 1, 2)})
    fit = Fit(inputs=inputs, targets=targets)
    merged, _ = merge(
        made, identity_matching(spec, 2), split, images_to_batches(tasks, 16), fit, labels="separate"
    )
    for m, x in enumerate(tasks):
        z = merged.features(x)
        if inputs == "source":
            own = [n[:4](x) for n in networks]
            shared = own[m] if targets == "own" else sum(own) / 2
            z = torch.cat([own[0][:, 3:], shared[:, :3], own[1][:, 3:]], 1)
        view = z[:, 3 * m : 3 * m + 6]
        zero = torch.zeros(classes[m], 6).double()
        W, b = lstsq(view, networks[m](x), zero, 0.0, torch.ones(len(x)).double(), True)
        close(merged.map_of(merged.head)(z).split(classes, 1)[m], view @ W.T + b)


@torch.no_grad()
@pytest.mark.parametrize("fit", [f for f in EXACT if f.targets == "own"], ids=name)
def test_tasks_weigh_alike_whatever_their_number_of_images(small, images, sources, fit):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    few, many = images(20, 0), images(20, 1)
    found = [
        merge(
            made, identity_matching(spec, 2), full_split(spec), images_to_batches(tasks, 15), fit, ridge=1e-3
        )[0]
        for tasks in ([few, many], [few, many.repeat(3, 1, 1, 1)])
    ]
    close(found[1](images(5, 7)), found[0](images(5, 7)), 1e-7)


@torch.no_grad()
def test_a_share_of_the_positions_is_used_and_an_exact_fit_stays_exact(copied, images, monkeypatch):
    network, made, matching, batches = copied
    counted = {1.0: 0, 0.25: 0}
    add = NormalEquations.add
    for positions in counted:

        def count(self, z, y, weight=1.0, positions=positions):
            counted[positions] += len(z)
            add(self, z, y, weight)

        monkeypatch.setattr(NormalEquations, "add", count)
        fit = Fit(inputs="merged", targets="own")
        merged, _ = merge(made, matching, full_split(made[0].trace.spec), batches, fit, positions=positions)
        close(merged(images()), network(images()), 1e-7)
    linear = 2 * 90  # two layers that have no positions
    assert counted[1.0] - linear == 90 * (64 + 64 + 16 + 16)
    assert counted[0.25] - linear == pytest.approx((counted[1.0] - linear) / 4, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("fit", EXACT, ids=name)
def test_batch_norm_without_weights_of_its_own_is_merged_too(
    randomise, sources, images, copies, calibrate, fit
):
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    batches = images_to_batches([images(20, 0), images(20, 1)], 8)
    network = randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)), 0)
    calibrate(network, torch.cat([batch.images for batch in batches]))
    networks, matching = copies(network, images())
    made = sources(networks, images())
    merged, _ = merge(made, matching, full_split(made[0].trace.spec), batches, fit)
    close(merged(images(9, seed=9)), network(images(9, seed=9)), 1e-7)


# -- the record and the visitor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", EXACT + ADAM, ids=name)
def test_every_layer_is_recorded_once_in_order(small, images, sources, fit):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    batches = images_to_batches([images(10, 0), images(10, 1)], 8)
    _, record = merge(made, identity_matching(spec, 2), full_split(spec), batches, fit)
    assert [line.layer for line in record] == [n.name for n in made[0].graph.nodes if n.linear]


def test_a_visitor_changes_nothing_before_it_visits(small, images, sources):
    made = sources([small(0), small(1)], images())
    shared = {n: g.size for n, g in made[0].trace.spec.free.items()}
    merged = MergedNetwork(made[0].trace, [s.task for s in made], "shared", shared).double()
    before = {k: v.clone() for k, v in merged.state_dict().items()}
    FitVisitor(Setup(merged, made, Fit()))
    assert all(torch.equal(v, before[k]) for k, v in merged.state_dict().items())
