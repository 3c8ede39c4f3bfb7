"""Every operation of the table in a small network of its own, through all gates.

Traced, verified in float64 with every group permuted, a permuted copy merged at 1.0 and 1.3, two networks side by side
at N, the counted cost, a file (tests/gates.py).
"""

import gates
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.core.graph.operations import ADAPTIVE, COMPARISONS, OPERATIONS, POOLS, ROUNDING, UNARY
from stages.core.tracing.trace import trace

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Between(nn.Module):
    """A convolution to 4 channels, ``body`` (of ``width`` channels then), another convolution, a head."""

    def __init__(self, body, rank=2, width=4, **modules):
        super().__init__()
        self.body, self.places = body, tuple(range(2, 2 + rank))
        self.first, self.second = CONVOLUTIONS[rank](3, 4, 3, padding=1), CONVOLUTIONS[rank](width, 5, 1)
        self.head = nn.Linear(5, 3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(torch.tanh(self.second(self.body(self, self.first(x)))).mean(self.places))


class Tokens(nn.Module):
    """Four tokens of width 8, ``body``, a head on their mean."""

    def __init__(self, body, **modules):
        super().__init__()
        self.first, self.head, self.body = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3), body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.body(self, self.first(x).flatten(2).transpose(1, 2)).mean(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.table(x).relu().mean(1))


def parameter(*shape):
    return nn.ParameterList([nn.Parameter(torch.rand(shape) + 0.5)])


def attend(m, x):
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in m.qkv(x).chunk(3, -1))
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend_by_hand(m, x):
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in m.qkv(x).chunk(3, -1))
    return x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def look_up(m, x):
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in m.qkv(x).chunk(3, -1))
    seen = torch.einsum("bhxyc,ykc->bhxyk", q.unflatten(2, (2, 2)), m.table[0])
    return x + ((q @ k.mT + seen.flatten(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def pool_heads(m, x):
    y = m.qkv(x).unflatten(-1, (2, 4)).transpose(1, 2).reshape(-1, 2, 2, 4).permute(0, 3, 1, 2)
    return x + m.pool(y).reshape(len(x), 2, 1, 4).transpose(1, 2).flatten(2)


def shifted(m, x):
    return m.norm(x) * 0.9


def body(rank=2, width=4, **modules):
    """(body) -> constructor."""
    return lambda f: lambda: Between(f, rank, width, **{n: make() for n, make in modules.items()})


def moved_about(m, x):
    theta = m.where(x.mean((2, 3))).unflatten(1, (2, 3))
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


CORNERS = torch.tensor([[-0.8, -0.3], [0.9, 0.1], [0.2, 0.7]]).view(1, 1, 3, 2)


def behind(f):
    """What acts on the logits."""
    return lambda: nn.Sequential(Between(lambda m, x: x.relu()), f)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


SHAPES = {1: (3, 8), 2: (3, 8, 8), 3: (3, 4, 4, 4)}
POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "log10", "digamma", "lgamma")
WITHIN_ONE = ("asin", "acos", "atanh", "erfinv")
SETTINGS = {"clamp": (-0.3, 0.4), "clamp_min": (-0.2,), "clamp_max": (0.3,), "threshold": (0.1, 0.2)}
BINARY = {
    "add": torch.add, "subtract": torch.sub, "multiply": torch.mul, "maximum": torch.maximum,
    "minimum": torch.minimum, "divide": lambda a, b: a / (b.abs() + 1),
    "raise": lambda a, b: (a.sigmoid() + 0.2) ** b,
    "remainder": lambda a, b: torch.remainder(a, b.abs() + 1),
    "fmod": lambda a, b: torch.fmod(a, b.abs() + 0.5),
    "floor_divide": lambda a, b: a + a // (b.abs() + 0.5),
    "atan2": lambda a, b: torch.atan2(a, b.abs() + 1),
    "hypot": torch.hypot,
    "copysign": lambda a, b: torch.copysign(a, b - 0.1),
    **{name: lambda a, b, name=name: a + (a * getattr(torch, name)(a, b)) for name in COMPARISONS},
}  # fmt: skip
MADE = {  # operation: constructor
    "linear": lambda: Tokens(lambda m, x: m.one(x).relu(), one=nn.Linear(8, 8)),
    "prelu": body(prelu=lambda: nn.PReLU(4))(lambda m, x: m.prelu(x)),
    "batch_norm": body(norm=lambda: nn.BatchNorm2d(4))(shifted),
    "norm_parameter": body(over=lambda: nn.Conv1d(1, 1, 3, padding=1), norm=lambda: nn.BatchNorm1d(1))(
        lambda m, x: x * m.norm(m.over(x.mean((2, 3))[:, None])).mT[..., None].sigmoid()),
    "batch_statistics": body(norm=lambda: nn.BatchNorm2d(4, track_running_stats=False))(shifted),
    "layer_norm": lambda: Tokens(shifted, norm=nn.LayerNorm(8)),
    "group_norm": body(norm=lambda: nn.GroupNorm(2, 4))(shifted),
    "local_response_norm": body(norm=lambda: nn.LocalResponseNorm(3), after=lambda: nn.Conv2d(4, 4, 1))(
        lambda m, x: m.after(m.norm(x))),
    "normalize": body()(lambda m, x: F.normalize(x, dim=1)),
    "mix": lambda: Tokens(lambda m, x: x + m.over(x.mT).mT, over=nn.Linear(4, 4)),
    "along": body(over=lambda: nn.Conv1d(1, 1, 3, padding=1))(
        lambda m, x: x * m.over(x.mean((2, 3))[:, None]).mT[..., None].sigmoid()),
    "attention": lambda: Tokens(attend, qkv=nn.Linear(8, 24)),
    "matmul": lambda: Tokens(attend_by_hand, qkv=nn.Linear(8, 24)),
    "softmax": body()(lambda m, x: x.flatten(2).softmax(-1).view_as(x)),
    "log_softmax": behind(nn.LogSoftmax(1)),
    "shift": body()(lambda m, x: x + 0.7),
    "scale": body()(lambda m, x: 0.7 * x),
    "divide_by": body()(lambda m, x: x / 0.7),
    "subtract_from": body()(lambda m, x: 0.7 - x),
    "power": body()(lambda m, x: x**2),
    "power_of": body()(lambda m, x: 1.5**x),
    **{f"{name}_number": body()(lambda m, x, name=name: x + getattr(torch, name)(x, 0.3)) for name in ROUNDING},
    **{f"{name}_number": body()(lambda m, x, name=name: x + x * getattr(torch, name)(x, 0.1)) for name in COMPARISONS},
    "where": body()(lambda m, x: torch.where(x > 0, x, x.sin())),
    "fill_parameter": lambda: Tokens(
        lambda m, x: x.masked_fill(torch.tensor([0, 1, 0, 1]).bool()[:, None], 0.5).relu()),
    "constant_parameter": lambda: Tokens(
        lambda m, x: F.scaled_dot_product_attention(m.one(m.query[0].expand(len(x), -1, -1)), x, x),
        query=parameter(1, 2, 8), one=nn.Linear(8, 8)),
    "concatenate": body(width=8)(lambda m, x: torch.cat([x, x.relu()], 1)),
    "concatenate_parameter": lambda: Tokens(
        lambda m, x: torch.cat([m.token[0].expand(len(x), -1, -1), x], 1).tanh(), token=parameter(1, 1, 8)),
    "rearrange": body(width=16)(lambda m, x: F.pixel_unshuffle(x, 2)),
    "select": body()(lambda m, x: x * x.select(3, 2).unsqueeze(2)),
    "slice": body(width=2)(lambda m, x: x[:, 1:3]),
    "pick": body(width=3)(lambda m, x: x[:, torch.tensor([2, 0, 3])]),
    "pad": body(width=6)(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1))),
    "roll": body()(lambda m, x: x.roll((1, 2), (2, 3)) * x),
    "flip": body()(lambda m, x: x.flip(3) * x),
    "expand": body()(lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid().expand(-1, -1, 8, 8)),
    "mean": body()(lambda m, x: x - x.mean((2, 3), keepdim=True)),
    "sum": body()(lambda m, x: x * x.sum((2, 3), keepdim=True)),
    "var": body()(lambda m, x: x / x.var(1, keepdim=True)),
    "length": body()(lambda m, x: x / (1 + x.norm(dim=(2, 3), keepdim=True))),
    "amax": body()(lambda m, x: x - x.amax((2, 3), keepdim=True)),
    "prod": body()(lambda m, x: x * (1 + 0.1 * x.tanh()).prod(3, keepdim=True)),
    "median": body()(lambda m, x: x - x.median(2, keepdim=True)[0]),
    "kthvalue": body()(lambda m, x: x - x.kthvalue(3, 2, keepdim=True)[0]),
    "logsumexp": body()(lambda m, x: x - x.logsumexp((2, 3), keepdim=True)),
    "cumsum": body()(lambda m, x: x.cumsum(2)),
    "cumprod": body()(lambda m, x: (1 + 0.1 * x.tanh()).cumprod(2)),
    "logcumsumexp": body()(lambda m, x: x.logcumsumexp(3)),
    "cummax": body()(lambda m, x: x.cummax(2)[0]),
    "cummin": body()(lambda m, x: x.cummin(2)[0]),
    "sort": body()(lambda m, x: x.sort(3, descending=True)[0]),
    "argsort": body()(lambda m, x: x.gather(3, x.sin().argsort(3))),
    "gather": body()(lambda m, x: x.gather(3, x.sin().argsort(3))),
    "topk": body()(lambda m, x: x.topk(3, 3)[0]),
    "topk_index": body()(lambda m, x: x.gather(3, x.sin().topk(2, 3)[1])),
    "scatter": body()(lambda m, x: torch.zeros_like(x).scatter(3, x.sin().topk(2, 3)[1], x.sin().topk(2, 3)[0])),
    "tril": body()(lambda m, x: x.tril(1)),
    "triu": body()(lambda m, x: x.triu()),
    "affine_grid": body(where=lambda: nn.Linear(4, 6))(lambda m, x: moved_about(m, x)),
    "grid_sample": body()(lambda m, x: F.grid_sample(x, CORNERS.expand(len(x), -1, -1, -1).to(x), align_corners=False)),
    "fourier": body()(lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x).conj() * (0.5 + 0.2j), s=(8, 8)) + x),
    "amin": body()(lambda m, x: x - x.amin((2, 3), keepdim=True)),
    "matmul_parameter": lambda: Tokens(look_up, qkv=nn.Linear(8, 24), table=parameter(2, 4, 4)),
    "convolve_parameter": lambda: Tokens(pool_heads, qkv=nn.Linear(8, 8), pool=nn.Conv2d(4, 4, 2, 1, 0, 1, 4, False)),
    "unfold": body(width=16)(lambda m, x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4))),
    "fold": body()(lambda m, x: F.fold(F.unfold(x, 3, padding=1).relu(), (8, 8), 3, padding=1)),
    "interpolate": body()(lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear")),
}  # fmt: skip


def domain(name, x):
    """Numbers that a function is defined for."""
    if name in WITHIN_ONE:
        return 0.9 * x.tanh()
    return x.sigmoid() + (0.2 if name in POSITIVE else 1.1) if name in (*POSITIVE, "acosh") else x


def cases():
    """{operation: (constructor, shape of an image)}."""
    found = {name: (make, SHAPES[2]) for name, make in MADE.items()}
    found["embedding"] = (Words, (6,))
    for rank in (1, 2, 3):
        kinds = {f"conv{rank}d": CONVOLUTIONS, f"conv_transpose{rank}d": TRANSPOSED}
        for name, kind in kinds.items():
            layer = lambda kind=kind, rank=rank: kind[rank](4, 6, 3, stride=2)  # noqa: E731
            found[name] = (body(rank, 6, layer=layer)(lambda m, x: m.layer(x)), SHAPES[rank])
    for name in (*POOLS, *ADAPTIVE):
        rank, size = int(name[-2]), 3 if name in ADAPTIVE else 2
        call = lambda m, x, name=name, size=size: getattr(F, name)(x, size)  # noqa: E731
        found[name] = (body(rank)(call), SHAPES[rank])
    for name, function in BINARY.items():
        both = lambda m, x, f=function: f(x, x.roll(1, 2))  # noqa: E731
        one = lambda m, x, f=function: f(x, m.own[0])  # noqa: E731
        found[name] = (body()(both), SHAPES[2])
        found[f"{name}_parameter"] = (body(own=lambda: parameter(4, 1, 1))(one), SHAPES[2])
    for name in UNARY:
        call = lambda m, x, name=name: getattr(torch.ops.aten, name)(  # noqa: E731
            domain(name, x), *SETTINGS.get(name, ()))  # fmt: skip
        found[name] = (body()(call), SHAPES[2])
    found["divide_parameter"] = (body(own=lambda: parameter(4, 1, 1))(lambda m, x: x / m.own[0]), SHAPES[2])
    return found


CASES = cases()


@pytest.mark.parametrize("operation", CASES)
def test_a_network_with_the_operation_passes_every_gate(operation):
    make, shape = CASES[operation]
    graph = trace(gates.trained(make, 0), gates.example(shape)).graph
    assert operation in {node.operation for node in graph.nodes}
    gates.check(make, shape)


def test_every_operation_of_the_table_has_a_case():
    assert set(CASES) == set(OPERATIONS)
