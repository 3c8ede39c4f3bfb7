import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.align.alignment import Alignment
from stages.core.align.order import align
from stages.core.graph.layouts import Layout, Segment
from stages.core.merged.arrangement import arrange, arrange_heads
from stages.core.merged.blocks import blocks_of
from stages.core.merged.network import MergedNetwork
from stages.core.units.matching import full_split, identity_matching
from stages.fit.average import average_block, average_vector, fill_average


@st.composite
def layouts(draw):
    """Groups of (units, shared, block) side by side."""
    return [
        (d, draw(st.integers(0, d)), draw(st.integers(1, 2)))
        for d in draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    ]


def parts(groups, networks):
    layout = Layout(1, tuple(Segment(str(i), d, block) for i, (d, _, block) in enumerate(groups)))
    return arrange(layout, {str(i): k for i, (_, k, _) in enumerate(groups)}, networks)


def entries(groups, networks):
    """Each merged entry as (owner or -1, index in that network's aligned tensor)."""
    found, start = [], 0
    for d, k, block in groups:
        for owner in [0, -1, *range(1, networks)]:
            units = range(k) if owner < 0 else range(k, d)
            found += [(owner, start + unit * block + i) for unit in units for i in range(block)]
        start += d * block
    return found


def expected_weight(sources, out, into):
    """One entry of the merged weight, by the four cases of Git Re-Basin with separate units."""
    (o, row), (i, column) = out, into
    if o < 0 and i < 0:
        return sum(w[row, column] for w in sources) / len(sources)
    if o < 0:
        return sources[i][row, column] / len(sources)
    return sources[o][row, column] if i in (-1, o) else torch.zeros(())


def shares(parts, networks):
    return [
        torch.where(parts.owner[own] < 0, 1 / torch.tensor(networks).double(), 1.0) for own in parts.positions
    ]


def filled(sources, inputs, outputs, kernel=()):
    weight = torch.zeros(outputs.width, inputs.width, *kernel, dtype=torch.float64)
    for block in blocks_of(inputs, outputs):
        weight[block.start : block.stop, block.columns] = average_block(
            sources, block, inputs, outputs, shares(outputs, len(sources))
        )
    return weight


@given(into=layouts(), out=layouts(), networks=st.integers(2, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_weight_follows_from_its_owners(into, out, networks):
    width = [sum(d * block for d, _, block in groups) for groups in (into, out)]
    sources = [torch.randn(width[1], width[0], dtype=torch.float64) for _ in range(networks)]
    weight = filled(sources, parts(into, networks), parts(out, networks))
    columns = entries(into, networks)
    for row, name in enumerate(entries(out, networks)):
        expected = torch.stack([expected_weight(sources, name, column) for column in columns])
        torch.testing.assert_close(weight[row], expected.double(), rtol=1e-14, atol=1e-14)


@given(into=layouts(), classes=st.lists(st.integers(1, 3), min_size=2, max_size=3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_separate_heads_are_each_network_s_own(into, classes):
    d, networks = sum(size * block for size, _, block in into), len(classes)
    sources = [torch.randn(n, d, dtype=torch.float64) for n in classes]
    weight = filled(sources, parts(into, networks), arrange_heads(classes))
    for m, own in enumerate(weight.split(classes)):
        for column, (owner, index) in enumerate(entries(into, networks)):
            expected = sources[m][:, index] if owner in (-1, m) else torch.zeros(classes[m]).double()
            assert torch.equal(own[:, column], expected)


@given(groups=layouts(), networks=st.integers(2, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_vectors_are_the_mean_where_shared_and_own_elsewhere(groups, networks):
    width = sum(d * block for d, _, block in groups)
    vectors = [torch.randn(width, dtype=torch.float64) for _ in range(networks)]
    merged = parts(groups, networks)
    found = average_vector(vectors, merged, shares(merged, networks))
    for entry, (owner, index) in zip(found, entries(groups, networks), strict=True):
        own = [vector[index] for vector in vectors] if owner < 0 else [vectors[owner][index]]
        torch.testing.assert_close(entry, sum(own) / len(own), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("networks", [2, 3])
def test_kernels_are_averaged_tap_by_tap(networks):
    into, out = [(3, 1, 1)], [(2, 1, 1)]
    sources = [torch.randn(2, 3, 3, 3, dtype=torch.float64) for _ in range(networks)]
    weight = filled(sources, parts(into, networks), parts(out, networks), (3, 3))
    for tap in range(9):
        flat = filled([w.flatten(2)[..., tap] for w in sources], parts(into, networks), parts(out, networks))
        assert torch.equal(weight.flatten(2)[..., tap], flat)


@torch.no_grad()
def test_sharing_everything_is_the_mean_of_all_parameters(small, images, sources):
    made = sources([small(0, bias=True), small(1, bias=True)], images())
    spec = made[0].trace.spec
    merged = MergedNetwork(made[0].trace, [s.task for s in made], "shared",
                           {n: g.size for n, g in spec.free.items()}).double()  # fmt: skip
    fill_average(merged, align(made, identity_matching(spec, 2), full_split(spec)), Alignment(2))
    mean = {name: (tensor + made[1].state[name]) / 2 for name, tensor in made[0].state.items()}
    network = small(5, bias=True)
    network.load_state_dict(mean)
    torch.testing.assert_close(merged(images()), network(images()), rtol=1e-12, atol=1e-12)
