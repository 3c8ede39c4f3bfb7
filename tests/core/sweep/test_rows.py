import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.core.graph.nodes import Node, oriented
from stages.core.sweep.rows import input_rows, kernel_of, output_rows, tap_columns, unit_rows, weight_matrix

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def conv_node(stride, padding, dilation):
    return Node("conv", "conv2d", ("x",), {"stride": stride, "padding": padding, "dilation": dilation})


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    kernel=pairs,
    stride=pairs,
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    dilation=pairs,
    bias=st.booleans(),
    side=st.tuples(st.integers(3, 8), st.integers(3, 8)),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rows_times_the_matrix_are_the_convolution(kernel, stride, padding, dilation, bias, side):
    if padding == "same":
        stride = (1, 1)  # torch allows no other
    around = (0, 0) if isinstance(padding, str) else padding
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    assume(padding == "same" or all(n + 2 * p > s for n, p, s in zip(side, around, spans, strict=True)))
    x, weight = random(2, 3, *side), random(5, 3, *kernel)
    b = random(5) if bias else torch.zeros(5, dtype=torch.float64)
    y = F.conv2d(x, weight, b, stride=stride, padding=padding, dilation=dilation)
    node = conv_node(list(stride), padding if isinstance(padding, str) else list(padding), list(dilation))
    rows = input_rows(node, x, kernel_of(weight)) @ weight_matrix(weight).T + b
    by_position = [y[n, :, i, j] for n in range(2) for i in range(y.shape[2]) for j in range(y.shape[3])]
    torch.testing.assert_close(rows, torch.stack(by_position))
    assert torch.equal(output_rows(node, y), torch.stack(by_position))


@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    extra=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_times_the_matrix_are_the_transposed_convolution(rank, kernel, stride, padding, extra, dilation):
    assume(extra < max(stride, dilation))
    side = [2, 4, 3][:rank]
    assume(all((n - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra >= 0 for n in side))
    x, weight = random(2, 3, *side), random(3, 5, *[kernel] * rank)
    settings = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation}
    attributes = {name: [value] * rank for name, value in settings.items()}
    node = Node("up", f"conv_transpose{rank}d", ("x",), attributes)
    y = getattr(F, node.operation)(x, weight, **settings)
    rows = input_rows(node, x, kernel_of(weight)) @ weight_matrix(oriented(node, weight)).T
    torch.testing.assert_close(rows, output_rows(node, y))


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 4)])
def test_rows_times_the_matrix_are_the_linear_map(shape):
    node, x, weight = Node("fc", "linear", ("x",)), random(*shape), random(6, 4)
    y = F.linear(x, weight)
    assert kernel_of(weight) == ()
    torch.testing.assert_close(input_rows(node, x, ()) @ weight_matrix(weight).T, output_rows(node, y))
    assert torch.equal(output_rows(node, y), y.flatten(0, -2))


@given(channels=st.sets(st.integers(0, 4), min_size=1), kernel=pairs)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_columns_of_a_channel_are_those_that_only_it_fills(channels, kernel):
    channels, taps = torch.tensor(sorted(channels)), kernel[0] * kernel[1]
    x = torch.zeros(2, 5, 4, 4)
    x[:, channels] = 1 + torch.rand(2, len(channels), 4, 4)
    rows = input_rows(conv_node([1, 1], [0, 0], [1, 1]), x, kernel)
    assert tap_columns(channels, taps).tolist() == rows.ne(0).all(0).nonzero().flatten().tolist()
    assert rows.ne(0).any(0).sum() == len(channels) * taps


@given(units=st.integers(1, 4), block=st.integers(1, 3), dim=st.integers(1, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_place_of_a_unit_is_one_row(units, block, dim):
    shape = [2, 3, 2, 4]
    shape[dim] = units * block
    y = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = unit_rows(y, dim, block)
    assert rows.shape == (y.numel() // units, units)
    for unit in range(units):
        own = y.narrow(dim, unit * block, block)
        assert sorted(rows[:, unit].tolist()) == sorted(own.flatten().tolist())
    offsets = rows - rows[:, :1]  # one row: the same place of every unit
    assert (offsets == offsets[:1]).all()
