import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.core.graph.nodes import Node
from stages.core.sweep.maps import MapSums
from stages.core.sweep.rows import input_rows, output_rows
from stages.core.sweep.shifted import plan

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

kernels = st.tuples(st.integers(1, 4), st.integers(1, 4))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3))
dilations = st.tuples(st.integers(1, 3), st.integers(1, 3))
paddings = st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"]))
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def conv_node(stride, padding, dilation):
    padding = padding if isinstance(padding, str) else list(padding)
    return Node(
        "c", "conv2d", ("x",), {"stride": list(stride), "padding": padding, "dilation": list(dilation)}
    )


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_tap(node, z, kernel):
    """Rows whose entries are in the order (tap, channel)."""
    rows = input_rows(node, z, kernel)
    return rows.unflatten(1, (z.shape[1], -1)).transpose(1, 2).flatten(1)


def plain(node, kernel, batches, intercept):
    """Gram and cross matrix, energy and means over the rows themselves, in float64."""
    z = torch.cat([by_tap(node, z.double(), kernel) for z, _, _ in batches])
    y = torch.cat([output_rows(node, y.double()) for _, y, _ in batches])
    w = torch.cat([y.new_full((len(output_rows(node, y)),), weight).double() for _, y, weight in batches])
    means = (w @ z / w.sum(), w @ y / w.sum())
    if intercept:
        z, y = z - means[0], y - means[1]
    return w.sum(), z.T @ (w[:, None] * z), z.T @ (w[:, None] * y), w @ y.square(), means


def check(node, kernel, batches, intercept, **close):
    sums = MapSums(node, kernel, batches[0][0].shape[2:], intercept)
    for z, y, weight in batches:
        sums.add(z, y, weight)
    found, (weight, G, C, yy, means) = sums.finish(), plain(node, kernel, batches, intercept)
    assert found.weight == pytest.approx(float(weight))
    torch.testing.assert_close(found.G, G, **close)
    torch.testing.assert_close(found.C, C, **close)
    torch.testing.assert_close(found.yy, yy, **close)
    assert (found.means is not None) == intercept
    for own, expected in zip(found.means or (), means, strict=False):
        torch.testing.assert_close(own, expected, **close)


def fits(size, kernel, padding, dilation):
    around = (0, 0) if isinstance(padding, str) else padding
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return padding == "same" or all(n + 2 * p > s for n, p, s in zip(size, around, spans, strict=True))


@given(
    kernel=kernels, stride=strides, padding=paddings, dilation=dilations, size=sizes, intercept=st.booleans()
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_sums_from_maps_are_those_of_the_rows(kernel, stride, padding, dilation, size, intercept):
    if padding == "same":
        stride = (1, 1)  # torch allows no other
    assume(fits(size, kernel, padding, dilation))
    node, batches = conv_node(stride, padding, dilation), []
    for seed, (n, weight) in enumerate([(3, 1.0), (2, 0.4)]):
        z = 2 + random(n, 3, *size, seed=seed)
        weights = random(4, 3, *kernel, seed=9)
        y = F.conv2d(z, weights, **node.attributes)
        batches.append((z, y + 5 * random(*y.shape, seed=seed + 10), weight))
    check(node, kernel, batches, intercept)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [((7, 7), (2, 2), (3, 3), (17, 18)), ((3, 3), (2, 2), (1, 1), (8, 8)), ((5, 5), (1, 1), (2, 2), (9, 7)),
     ((4, 4), (4, 4), (0, 0), (16, 16)), ((1, 1), (2, 2), (0, 0), (7, 8)), ((1, 7), (1, 1), (0, 3), (5, 9))],
)  # fmt: skip
@pytest.mark.parametrize("intercept", [False, True])
def test_the_kernels_of_known_networks(kernel, stride, padding, size, intercept):
    node = conv_node(stride, padding, (1, 1))
    z = 1 + random(4, 5, *size)
    y = F.conv2d(z, random(6, 5, *kernel, seed=1), **node.attributes)
    check(node, kernel, [(z, y, 1.0)], intercept)


@pytest.mark.parametrize("step", [1, 2, 100])
def test_sums_do_not_depend_on_how_many_images_are_taken_at_a_time(step, monkeypatch):
    monkeypatch.setattr("stages.core.sweep.maps.MAP_ENTRIES", step * 5 * 36)
    node = conv_node((1, 1), (1, 1), (1, 1))
    z = 1 + random(5, 5, 6, 6)
    check(node, (3, 3), [(z, random(5, 2, 6, 6, seed=1), 1.0)], True)


def test_no_targets_are_needed():
    node, z = conv_node((1, 1), (1, 1), (1, 1)), random(5, 3, 6, 6)
    sums = MapSums(node, (3, 3), (6, 6), False)
    sums.add(z, weight=0.5)
    found, rows = sums.finish(), by_tap(node, z, (3, 3))
    torch.testing.assert_close(found.G, 0.5 * rows.T @ rows)
    assert found.C is None
    assert found.yy is None


@pytest.mark.parametrize("offset", [1.0, 100.0, 10_000.0])
def test_a_common_offset_costs_no_digits(offset):
    """Beyond those that the values themselves have lost to it."""
    node, z = conv_node((1, 1), (1, 1), (1, 1)), (offset + random(60, 3, 8, 8)).float()
    y = (offset + random(60, 2, 8, 8, seed=1)).float()
    sums = MapSums(node, (3, 3), (8, 8), True)
    sums.add(z, y)
    found = sums.finish()
    _, G, C, _, _ = plain(node, (3, 3), [(z, y, 1.0)], True)
    inner = slice(4 * 3, 5 * 3)  # the middle tap never sees padding
    assert (found.G - G).abs().max() < 1e-5 * G.abs().max()
    assert (found.G - G)[inner, inner].abs().max() < 1e-5 * G[inner, inner].abs().max()
    assert (found.C - C)[inner].abs().max() < 1e-5 * 60 * 64


@pytest.mark.parametrize("shape", [(16, 32, 32), (64, 8, 8)])
def test_rounding_is_as_good_as_that_of_products_of_rows(shape):
    node, z = conv_node((1, 1), (1, 1), (1, 1)), random(100, *shape, dtype=torch.float32).relu()
    _, G, _, _, _ = plain(node, (3, 3), [(z, z, 1.0)], False)
    rows = by_tap(node, z, (3, 3))
    sums = MapSums(node, (3, 3), shape[1:], False)
    sums.add(z)
    found, by_rows = sums.finish().G, (rows.T @ rows).double()
    assert (found - G).norm() < 2 * (by_rows - G).norm()
    assert (found - G).norm() < 3e-6 * G.norm()


def test_products_of_a_three_by_three_kernel_depend_on_the_difference_of_taps():
    found = plan(conv_node((1, 1), (1, 1), (1, 1)), (3, 3), (32, 32))
    assert found.correlations[0].count == 15  # 13, as 3 x 5
    assert found.products < 1.1 * 15 * 32 * 32
    assert len(found.blocks) == 45
