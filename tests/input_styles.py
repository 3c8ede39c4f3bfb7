"""Networks as people write them for other inputs than images with channels first, and with what they join values."""

import torch
import torch.nn.functional as F
from torch import nn


class Series(nn.Module):
    """Features last: a linear map of every step, positions, an encoder, a mean over time."""

    def __init__(self):
        super().__init__()
        self.embed, self.where = nn.Linear(5, 6), nn.Parameter(torch.randn(7, 6))
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.encoder(self.embed(x) + self.where).mean(dim=1))


class ChannelsLast(nn.Module):
    def __init__(self, order=(0, 3, 1, 2)):
        super().__init__()
        self.conv, self.fc, self.order = nn.Conv2d(3, 6, 3), nn.Linear(6, 3), order

    def forward(self, x):
        return self.fc(F.relu(self.conv(x.permute(self.order))).mean((2, 3)))


class Grey(nn.Module):
    """Images without a dimension for their one channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x.unsqueeze(1))).mean((2, 3)))


class Points(nn.Module):
    """PointNet: the maximum over points of what a shared network makes of each."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)
        self.two, self.fc = nn.Conv1d(6, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.one(x.transpose(2, 1))))
        return self.fc(torch.max(self.two(x), 2, keepdim=True)[0].view(-1, 8))


class RootMeanSquare(nn.Module):
    """As language models have it: in single precision whatever the weights are."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class Grouped(nn.Module):
    """Rotary positions on pairs, two heads of keys and values for four of queries, gated linear maps."""

    def __init__(self):
        super().__init__()
        self.patch, self.norms = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(RootMeanSquare(8) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(8, n, bias=False) for n in (16, 8, 8))
        self.o, self.up, self.gate = (nn.Linear(a, b, bias=False) for a, b in ((16, 8), (8, 6), (8, 6)))
        self.down, self.fc = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        angles = torch.outer(torch.arange(4.0), 0.1 ** torch.arange(2.0))
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def turned(self, x):
        a, b, (cos, sin) = x[..., ::2], x[..., 1::2], self.turn
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        y = self.norms[0](x)
        q, k, v = (own(y).view(n, t, -1, 4).transpose(1, 2) for own in (self.q, self.k, self.v))
        k, v = (own.repeat_interleave(2, 1) for own in (self.turned(k), v))
        y = F.scaled_dot_product_attention(self.turned(q), k, v).transpose(1, 2).reshape(n, t, 16)
        x = x + self.o(y)
        y = self.norms[1](x)
        return self.fc(self.norms[2](x + self.down(F.silu(self.gate(y)) * self.up(y))).mean(1))


class Recurrent(nn.Module):
    """A recurrent network written out, from a state of zeros."""

    def __init__(self):
        super().__init__()
        self.read, self.keep, self.fc = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = torch.zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, t]) + self.keep(state))
        return self.fc(state)


class Layers(nn.Module):
    """torch's own recurrent layers, over the rows of an image."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.layers = kind(6, 4, batch_first=True, **settings)
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(4 * (1 + self.layers.bidirectional), 3)

    def forward(self, x):
        x = torch.einsum("nchw->nhcw", F.max_pool2d(F.relu(self.conv(x)), (2, 4))).flatten(2)
        return self.fc(self.layers(x)[0][:, -1])


class Steps(nn.Module):
    """A recurrent cell in a loop, from a state that is learned."""

    def __init__(self):
        super().__init__()
        self.cell, self.first, self.fc = (
            nn.LSTMCell(5, 4),
            nn.Parameter(torch.randn(2, 1, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        state = tuple(own.expand(len(x), -1) for own in self.first)
        for given in x.unbind(1):
            state = self.cell(given, state)
        return self.fc(state[0])


class Queries(nn.Module):
    """Learned queries read an image (Perceiver, DETR, the pooling of SigLIP)."""

    def __init__(self):
        super().__init__()
        self.patch, self.query = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(2, 8))
        self.attn, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.mlp, self.fc = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        query = self.query.unsqueeze(0).repeat(x.shape[0], 1, 1)
        y = query + self.attn(query, x, x)[0]
        return self.fc((y + self.mlp(self.norm(y))).mean(1))


class Pooled(nn.Module):
    """One query, which is a parameter as it is."""

    def __init__(self):
        super().__init__()
        self.patch, self.query = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.both, self.fc = nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, x):
        k, v = self.both(self.patch(x).flatten(2).mT).chunk(2, -1)
        return self.fc((((self.query / 8**0.5) @ k.mT).softmax(-1) @ v).squeeze(1))


class Coordinates(nn.Module):
    """CoordConv: where a pixel is, as channels beside its colours."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(5, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        n, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(n, 1, h, w)
        columns = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(n, 1, h, w)
        return self.fc(F.relu(self.conv(torch.cat([x, rows, columns], 1))).mean((2, 3)))


class Causal(nn.Module):
    """Numbers one after the other, attention to what came before alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.where, self.qkv = (
            nn.Linear(2, 8),
            nn.Parameter(torch.randn(1, 6, 8)),
            nn.Linear(8, 24),
        )
        self.proj, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6))

    def forward(self, x):
        x = self.embed(x) + self.where
        n, t, c = x.shape
        q, k, v = (y.view(n, t, 2, 4).transpose(1, 2) for y in self.qkv(x).split(c, 2))
        scores = ((q @ k.transpose(-2, -1)) / 2).masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(n, t, c)
        return self.fc((x + self.proj(y))[:, -1])


class Cases(nn.Module):
    """Comparisons, and what depends on them."""

    def __init__(self):
        super().__init__()
        self.conv, self.two, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        seen = (x.abs().sum(1, keepdim=True) > 1.0).float()[..., 1:-1, 1:-1]
        x = self.conv(x)
        x = torch.where(x > 0, x, 0.1 * x) * seen
        x = self.two(x.masked_fill((x < -1) | ~(x <= 2), 0.5))
        return self.fc(torch.where(x >= 0.1, x, 0.1).sum((2, 3)) / seen.sum((2, 3)).clamp(min=1))


class GeneralisedMean(nn.Module):
    """A pooling whose power is learned."""

    def __init__(self):
        super().__init__()
        self.conv, self.p, self.fc = nn.Conv2d(3, 6, 3), nn.Parameter(torch.ones(1) * 3), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv(x)).clamp(min=1e-6).pow(self.p)
        return self.fc(F.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1.0 / self.p).flatten(1))


class Copies(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.two, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv(x)).repeat(1, 2, 1, 1)
        return self.fc(self.two(x).amax((2, 3)))


class Written(nn.Module):
    """A part of the channels convolved in its place (FasterNet)."""

    def __init__(self):
        super().__init__()
        self.conv, self.part = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.two, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x[:, 2:4] = self.part(x[:, :2])
        return self.fc(F.relu(self.two(x)).mean((2, 3)))


class Shift(nn.Module):
    """TSM: some channels come from the frame before, some from the one behind, written into zeros."""

    def __init__(self):
        super().__init__()
        self.conv, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        n, t, c, h, w = x.shape
        y = F.relu(self.conv(x.view(n * t, c, h, w)))
        y = y.view(n, t, *y.shape[1:])
        moved = torch.zeros_like(y)
        moved[:, :-1, :2] = y[:, 1:, :2]
        moved[:, 1:, 2:4] = y[:, :-1, 2:4]
        moved[:, :, 4:] = y[:, :, 4:]
        y = self.two(moved.view(n * t, *y.shape[2:])).mean((2, 3))
        return self.fc(y.view(n, t, -1).mean(1))


IMAGE = (3, 8, 8)
INPUTS = {
    "time series": (Series, (7, 5)),
    "channels last": (ChannelsLast, (8, 8, 3)),
    "time before channels": (lambda: ChannelsLast((0, 2, 1, 3)), (8, 3, 8)),
    "without a channel": (Grey, (8, 8)),
    "points": (Points, (9, 3)),
    "lstm": (lambda: Layers(nn.LSTM, num_layers=2, dropout=0.1), IMAGE),
    "gru both ways": (lambda: Layers(nn.GRU, bidirectional=True), IMAGE),
    "rnn": (lambda: Layers(nn.RNN, nonlinearity="relu", bias=False), IMAGE),
    "a cell in a loop": (Steps, (4, 5)),
    "learned queries": (Queries, IMAGE),
    "one learned query": (Pooled, IMAGE),
    "coordinates": (Coordinates, IMAGE),
    "causal mask": (Causal, (6, 2)),
    "comparisons": (Cases, IMAGE),
    "a learned power": (GeneralisedMean, IMAGE),
    "copies of channels": (Copies, IMAGE),
    "written over a part": (Written, IMAGE),
    "shifted in time": (Shift, (3, 3, 8, 8)),
}
SINGLE = {  # whose forward names single precision, and so takes no other weights
    "norms in single precision": (Grouped, IMAGE),
    "recurrent by hand": (Recurrent, (4, 5)),
}
