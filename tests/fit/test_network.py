"""Random architectures through the whole engine: trace, verify, permute, merge, save, load."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.core.merged.cost import built_cost, source_cost, split_cost
from stages.core.merged.file import load_merged
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify
from stages.core.units.matching import Matching, full_split
from stages.fit.network import check_separate, fit_network

AVERAGE = Fit(solver="average")


# -- random architectures -----------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Convolution, perhaps batch norm, ReLU."""

    def __init__(self, c_in, width, kernel, stride, dilation, bias, norm):
        super().__init__()
        padding = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
        self.conv = nn.Conv2d(c_in, width, kernel, stride, padding, dilation, bias=bias)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, c_in, width, kernel, bias, norm):
        super().__init__()
        self.first = Plain(c_in, width, kernel, 1, (1, 1), bias, norm)
        self.second = nn.Conv2d(width, c_in, 1, bias=bias)

    def forward(self, x):
        return F.relu(x + self.second(self.first(x)))


class Dense(nn.Module):
    """The input beside what a convolution makes of it."""

    def __init__(self, c_in, width, kernel, bias, norm):
        super().__init__()
        self.layer = Plain(c_in, width, kernel, 1, (1, 1), bias, norm)

    def forward(self, x):
        return torch.cat([x, self.layer(x)], 1)


class Drawn(nn.Module):
    def __init__(self, plan, classes):
        super().__init__()
        stem, blocks, flatten, hidden = plan
        layers, c, parts = [Plain(2, *stem)], stem[0], 1
        for kind, *rest in blocks:
            if kind == "residual" and parts > 1:  # the sum needs one group: a transition, as DenseNets have
                layers.append(Plain(c, c, (1, 1), 1, (1, 1), True, False))
            parts = {"pool": parts, "dense": parts + 1}.get(kind, 1)
            if kind == "pool":
                layers.append(nn.MaxPool2d(2) if rest[0] else nn.AvgPool2d(2))
            else:
                layers.append({"plain": Plain, "residual": Residual, "dense": Dense}[kind](c, *rest))
                c = {"plain": rest[0], "residual": c, "dense": c + rest[0]}[kind]
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        widths = [c * (4 if flatten else 1), *hidden]
        self.tail = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = torch.flatten(self.pool(self.body(x)), 1)
        for layer in self.tail:
            x = F.relu(layer(x))
        return self.fc(x)


@st.composite
def plans(draw):
    width, flag = st.integers(1, 4), st.booleans()
    kernel = st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3]))
    two = st.tuples(st.integers(1, 2), st.integers(1, 2))
    block = st.one_of(
        st.tuples(st.just("plain"), width, kernel, two, two, flag, flag),
        st.tuples(st.just("residual"), width, kernel, flag, flag),
        st.tuples(st.just("dense"), width, kernel, flag, flag),
        st.tuples(st.just("pool"), flag),
    )
    pools = st.lists(block, max_size=3).filter(lambda blocks: sum(b[0] == "pool" for b in blocks) < 2)
    hidden = st.lists(st.integers(1, 5), max_size=2)
    return draw(st.tuples(width, kernel, two, two, flag, flag)), draw(pools), draw(flag), draw(hidden)


cases = given(
    plan=plans(),
    classes=st.lists(st.integers(2, 3), min_size=2, max_size=3),
    labels=st.sampled_from(["shared", "separate"]),
    seed=st.integers(0, 1000),
    dense=st.booleans(),
)
few = settings(max_examples=25, deadline=None, derandomize=True)


def example(n=3):
    return torch.randn(n, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def heads(classes, labels):
    return classes if labels == "separate" else [classes[0]] * len(classes)


def random_matching(spec, networks, seed):
    generator = torch.Generator().manual_seed(seed)
    units = {
        name: torch.stack(
            [torch.arange(g.size), *(torch.randperm(g.size, generator=generator) for _ in range(1, networks))]
        )
        for name, g in spec.free.items()
    }
    return Matching(units, {})


def average(sources, matching, chosen, labels, dense):
    batches = [Batch(example(), 0)]
    return fit_network(sources, matching, chosen, batches, AVERAGE, labels=labels, dense=dense)[0]


@torch.no_grad()
@cases
@few
def test_a_merged_network_is_saved_loaded_and_costs_what_was_promised(
    plan, classes, labels, seed, dense, randomise, sources, splits, tmp_path_factory
):
    networks = [randomise(Drawn(plan, n), seed + m) for m, n in enumerate(heads(classes, labels))]
    verify(networks[0], trace(networks[0], example()), example())
    made = sources(networks, example(), labels)
    spec, n = made[0].trace.spec, len(made)
    chosen = splits(spec, seed)
    merged = average(made, random_matching(spec, n, seed), chosen, labels, dense)
    path = tmp_path_factory.mktemp("merged") / "network.safetensors"
    merged.save(path)
    loaded = load_merged(path)
    assert torch.equal(loaded(example()), merged(example()))
    shared = {name: len(split.shared) for name, split in chosen.items()}
    for kind in ("macs", "parameters"):
        promised = split_cost(made[0].trace, made[0].state, labels, kind, shared, n, dense)
        assert built_cost(loaded, kind) == promised
        one = source_cost(made[0].trace, made[0].state, labels, kind)
        assert one <= promised <= (n * n if dense else n) * one
    with FlopCounterMode(display=False) as counter:
        loaded(example(1))
    assert counter.get_total_flops() == 2 * built_cost(loaded, "macs", heads=True)


@torch.no_grad()
@cases
@few
def test_everything_separate_is_the_sources_side_by_side(
    plan, classes, labels, seed, dense, randomise, sources
):
    networks = [randomise(Drawn(plan, n), seed + m) for m, n in enumerate(heads(classes, labels))]
    made = sources(networks, example(), labels)
    spec = made[0].trace.spec
    matching = random_matching(spec, len(made), seed)
    merged = average(made, matching, full_split(spec, dict.fromkeys(spec.free, ())), labels, dense)
    features = []
    for network in networks:
        network.fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    logits = [network(example()) for network in networks]
    found = merged.features(example())
    for m, own in enumerate(features):
        positions = merged.arrangement(merged.head.inputs[0]).positions[m]
        order = torch.cat([
            start + (units[m][:, None] * block + torch.arange(block)).flatten()
            for units, block, start in aligned_order(merged, matching)
        ])  # fmt: skip
        torch.testing.assert_close(found[:, positions], own[:, order], rtol=1e-12, atol=1e-12)
    if labels == "shared":
        torch.testing.assert_close(merged(example()), sum(logits) / len(logits), rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(merged(example()), torch.cat(logits, 1), rtol=1e-12, atol=1e-12)


def aligned_order(merged, matching):
    """For each group along the head's input: the networks' units in merged order, entries a unit, first entry."""
    start, found = 0, []
    for segment in merged.trace.layouts[merged.head.inputs[0]].segments:
        found.append((matching.units[segment.group], segment.block, start))
        start += segment.size * segment.block
    return found


@torch.no_grad()
@cases
@few
def test_permuted_copies_merge_into_that_network_whatever_is_shared(
    plan, classes, labels, seed, dense, randomise, sources, copies, splits
):
    networks, matching = copies(randomise(Drawn(plan, classes[0]), seed), example(), len(classes), seed)
    made = sources(networks, example(), labels)
    expected = networks[0](example())
    if labels == "separate":
        expected = expected.repeat(1, len(networks))
    for chosen in (full_split(made[0].trace.spec), splits(made[0].trace.spec, seed)):
        merged = average(made, matching, chosen, labels, dense)
        torch.testing.assert_close(merged(example()), expected, rtol=1e-10, atol=1e-10)
    one = source_cost(made[0].trace, made[0].state, labels, "macs")
    assert built_cost(average(made, matching, full_split(made[0].trace.spec), labels, dense), "macs") == one


# -- gates --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(small, images, sources):
    return sources([small(0), small(1)], images())


def test_a_matching_that_does_not_fit_stops_with_the_group(pair, images):
    spec = pair[0].trace.spec
    matching = random_matching(spec, 2, 0)
    matching.units["conv3"][1, 0] = matching.units["conv3"][1, 1]
    with pytest.raises(InputError, match="group conv3, network 1"):
        fit_network(pair, matching, full_split(spec), [Batch(images(), 0)], AVERAGE, labels="shared")


def test_features_that_are_not_the_sources_stop_with_the_group(pair, images):
    spec = pair[0].trace.spec
    split = full_split(spec, dict.fromkeys(spec.free, ()))
    matching = Matching({n: torch.arange(g.size).repeat(2, 1) for n, g in spec.free.items()}, {})
    merged, _ = fit_network(pair, matching, split, [Batch(images(), 0)], AVERAGE, labels="shared")
    check_separate(merged, pair, images())
    with torch.no_grad():
        merged.map_of(next(n for n in merged.trace.graph.nodes if n.name == "conv1")).weights[0][0, 0] += 1e-3
    with pytest.raises(
        AssertionError, match="group hidden: everything is separate, but task a's features changed"
    ):
        check_separate(merged, pair, images())


def test_a_fit_that_will_not_fit_in_memory_is_refused_in_one_line(pair, images):
    spec = pair[0].trace.spec
    with pytest.raises(InputError, match=r"^fit: needs .* GiB, there are .* GiB; allowed: ") as error:
        fit_network(pair, random_matching(spec, 2, 0), full_split(spec), [Batch(images(), 0)], Fit(),
                    labels="shared", memory=1e-6)  # fmt: skip
    assert "\n" not in str(error.value)


def test_a_merge_leaves_the_sources_as_they_were(pair, images):
    spec, before = pair[0].trace.spec, [{k: v.clone() for k, v in s.state.items()} for s in pair]
    batches = [Batch(images(20, task), task) for task in (0, 1)]
    for fit in (AVERAGE, Fit(inputs="merged", targets="own", norm="fold")):
        fit_network(pair, random_matching(spec, 2, 0), full_split(spec), batches, fit, labels="shared")
    for source, state in zip(pair, before, strict=True):
        assert all(torch.equal(source.state[name], tensor) for name, tensor in state.items())


def test_a_merge_is_repeatable_to_the_last_bit(pair, images):
    spec = pair[0].trace.spec
    batches = [Batch(images(20, task), task) for task in (0, 1)]
    for fit in (Fit(inputs="merged", targets="own", norm="fold"), Fit(solver="adam", steps=5)):
        first, second = (
            fit_network(pair, random_matching(spec, 2, 0), full_split(spec), batches, fit, labels="shared",
                        positions=0.5, generator=torch.Generator().manual_seed(3))[0]
            for _ in range(2)
        )  # fmt: skip
        assert torch.equal(first(images()), second(images()))
