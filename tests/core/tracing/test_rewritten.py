"""Calls that are written as others before a graph is read, each in a small network that passes the gates."""

import gates
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from stages.api import merge
from stages.core.runtime.errors import InputError
from stages.core.tracing.trace import trace


class Small(nn.Module):
    """``body`` between the input and a head; modules and parameters by name."""

    def __init__(self, body, width, **parts):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x):
        return self.head(self.body(self, x))


def projected(both):
    return lambda: Small(
        lambda m, x: m.rnn(m.first(x))[0].mean(1), 4 * (1 + both), first=nn.Embedding(11, 5),
        rnn=nn.LSTM(5, 6, proj_size=4, batch_first=True, bidirectional=both))  # fmt: skip


def points(m, x):
    """Of PointNet++ and the point transformer: the number of an image beside that of a point."""
    chosen = torch.cdist(x, x).argsort()[:, :, :3]
    images = torch.arange(len(x)).view(-1, 1, 1).repeat(1, *chosen.shape[1:])
    keys, values, queries = m.k(x)[images, chosen, :], m.v(x)[images, chosen, :], m.q(x)
    return (F.softmax(queries[:, :, None] - keys, -2) * values).sum(2).mean(1)


def expanded(m, x):
    x = F.relu(m.first(x.mean(1)))
    far = x.pow(2).sum(1, keepdim=True) + m.centres.pow(2).sum(1)[None]
    return F.relu(m.second(torch.exp(-0.1 * far.addmm(x, m.centres.t(), beta=1, alpha=-2))))


def numbered(m, x):
    places = torch.arange(x.size(1)).unsqueeze(0).expand_as(x)
    return F.relu(m.first(x) + m.places(places) + m.kinds(torch.zeros_like(x))).mean(1)


def causal(m, x):
    """GPT-2 as Hugging Face writes it: a mask of what is seen, and a cache that is empty."""
    x = m.first(x)
    q, k, v = (own.view(*own.shape[:2], 2, 4).transpose(1, 2) for own in m.qkv(x).chunk(3, -1))
    k = torch.cat([torch.tensor([]), k], -2)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(q, k, v, seen[None, None].expand(len(x), -1, -1, -1))
    return F.relu(m.out(y.transpose(1, 2).flatten(2)) + x)


def last_word(m, x):
    """GPT-2 as a classifier: of the last word that is no padding."""
    last = (torch.arange(x.shape[1], dtype=torch.int32) * (x != 0).to(torch.int32)).argmax(-1)
    return F.relu(m.out(F.relu(m.first(x))))[torch.arange(len(x)), last]


def registers(m, x):
    """DINOv2: tokens of its own between the first and the others."""
    x = m.first(x)
    x = torch.cat([x[:, :1], m.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    return F.relu(m.out(torch.softmax(x @ x.mT / 3, -1) @ x)).mean(1)


def kinds(m, x):
    """RoBERTa: places that the tokens tell, and kinds that are looked up there in a list of zeros."""
    places = torch.cumsum(x.ne(1).int(), 1).long() * x.ne(1) + 1
    zeros = m.zeros.expand(len(x), -1).gather(1, places)
    return F.relu(m.first(x) + m.kinds(zeros) + m.places(places)).mean(1)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("list", torch.zeros(1, 9, dtype=torch.long), persistent=False)

    def expand(self, *sizes):
        return self.list.expand(*sizes)


def quotient(m, x):
    x = torch.fft.fft(x.mean(1))
    return (m.one(x) / (m.two(x) + 2) + torch.exp(m.one(x) / 9)).abs()


def complex_map(*widths):
    return nn.Linear(*widths, dtype=torch.cfloat)


class Offsets(nn.Module):
    """Where the rows of each column begin in one table for all (factorisation machines)."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(48, 4)
        self.register_buffer("starts", torch.arange(4) * 11)

    def forward(self, x):
        return F.relu(self.rows(x + self.starts.unsqueeze(0))).flatten(1)


NETWORKS = {
    "a mask of what is seen": ((5,), lambda: Small(
        causal, 8, first=nn.Embedding(11, 8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))),
    "the last word": ((5,), lambda: Small(last_word, 6, first=nn.Embedding(11, 7), out=nn.Linear(7, 6))),
    "the largest place": ((4, 5), lambda: Small(
        lambda m, x: F.relu(m.first(x)).gather(1, x.argmin(1, keepdim=True)[..., :1].expand(-1, -1, 6)).mean(1), 6,
        first=nn.Linear(5, 6))),
    "tokens between others": ((4, 5), lambda: Small(
        registers, 6, first=nn.Linear(5, 6), registers=torch.randn(1, 2, 6), out=nn.Linear(6, 6))),
    "a list of zeros": ((5,), lambda: Small(
        kinds, 6, first=nn.Embedding(11, 6), kinds=nn.Embedding(2, 6), places=nn.Embedding(9, 6), zeros=Listed())),
    "columns of one table": ((4,), lambda: Small(lambda m, x: m.rows(x), 16, rows=Offsets())),
    "deformable": ((3, 6, 6), lambda: Small(
        lambda m, x: F.relu(m.op(F.relu(m.first(x)), m.offset(x), m.mask(x).sigmoid())).mean((2, 3)), 4,
        op=torchvision.ops.DeformConv2d(6, 4, (3, 2), 2, (2, 1), (1, 2), 2), first=nn.Conv2d(3, 6, 1),
        offset=nn.Conv2d(3, 12, (3, 3), 2, (2, 1)), mask=nn.Conv2d(3, 6, (3, 3), 2, (2, 1)))),
    "bilinear": ((5,), lambda: Small(
        lambda m, x: F.relu(m.both(F.relu(m.one(m.first(x).mean(1))), F.relu(m.two(m.first(x).mean(1))))), 7,
        first=nn.Embedding(11, 5), one=nn.Linear(5, 4), two=nn.Linear(5, 6), both=nn.Bilinear(4, 6, 7))),
    "projected states": ((4,), projected(False)),
    "projected states, both ways": ((4,), projected(True)),
    "points": ((6, 3), lambda: Small(points, 8, q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 8))),
    "distances": ((4, 5), lambda: Small(
        lambda m, x: torch.exp(-torch.cdist(F.relu(m.first(x.mean(1))), m.centres)), 7,
        first=nn.Linear(5, 6), centres=torch.randn(7, 6))),
    "distances of places": ((3, 6, 6), lambda: Small(
        lambda m, x: ((m.first(x)[:, None] - m.centres) ** 2).mean(2).amin((2, 3)), 7,
        first=nn.Conv2d(3, 6, 1), centres=torch.randn(7, 6, 1, 1))),
    "distances by their squares": ((4, 5), lambda: Small(
        expanded, 7, first=nn.Linear(5, 6), second=nn.Linear(4, 7), centres=torch.randn(4, 6))),
    "positions of another's shape": ((4,), lambda: Small(
        numbered, 6, first=nn.Embedding(11, 6), places=nn.Embedding(4, 6), kinds=nn.Embedding(2, 6))),
    "quotients of complex numbers": ((2, 6), lambda: Small(
        quotient, 5, one=complex_map(6, 5), two=complex_map(6, 5))),
    "slopes at random": ((3, 6, 6), lambda: Small(
        lambda m, x: F.rrelu(m.first(x)).mean((2, 3)), 6, first=nn.Conv2d(3, 6, 1))),
    "an infinite mask": ((4, 5), lambda: Small(
        lambda m, x: m.attend(*[m.first(x)] * 3, attn_mask=torch.full((4, 4), -torch.inf).triu(1))[0].mean(1), 8,
        first=nn.Linear(5, 8), attend=nn.MultiheadAttention(8, 2, batch_first=True))),
}  # fmt: skip


@pytest.mark.parametrize("what", NETWORKS)
def test_a_call_that_is_written_as_others_passes_the_gates(what):
    shape, make = NETWORKS[what]
    gates.check(make, shape)


def packed(m, x):
    lengths = (x > 0).sum(1).cpu()
    texts = nn.utils.rnn.pack_padded_sequence(m.first(x), lengths, batch_first=True, enforce_sorted=False)
    return m.rnn(texts)[1][0]


class Several(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.kind = nn.Linear(5, 3), kind

    def forward(self, x):
        return self.kind(self.first(x))


@pytest.mark.parametrize(
    ("network", "x", "words"),
    [
        (Several(lambda y: {"logits": y}), torch.zeros(2, 5), "a dict of one tensor; allowed: one tensor"),
        (Several(lambda y: [y]), torch.zeros(2, 5), "a list of one tensor"),
        (
            Small(packed, 6, first=nn.Embedding(11, 5), rnn=nn.LSTM(5, 6, batch_first=True)),
            torch.ones(2, 4).long(),
            "no rule for a packed sequence, whose length each text decides",
        ),
    ],
    ids=["dict", "list", "packed"],
)
def test_what_is_no_tensor_of_all_images_is_refused_in_one_line(network, x, words):
    with pytest.raises(InputError, match=words) as error:
        trace(network, x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [nn.Conv2d, lambda *sizes, **more: nn.Conv2d(*sizes, **more, bias=False)])
def test_layers_of_groups_in_single_precision_are_fitted(kind):
    """Their ridge is chosen on images held out."""
    networks = {}
    for name in "ab":
        grouped = Small(
            lambda m, x: F.relu(m.second(F.relu(m.first(x)))).mean((2, 3)),
            6,
            first=nn.Conv2d(3, 8, 3),
            second=kind(8, 6, 3, groups=2),
        )
        networks[name] = grouped.eval()
    images = {name: [torch.randn(40, 3, 6, 6)] for name in "ab"}
    found = merge(networks, images, 1.2, progress=False)
    assert torch.isfinite(found(images["a"][0])).all()
