"""Classifiers of texts: tokens, padding, windows of words, states of both directions, rotary positions."""

import torch
import torch.nn.functional as F
from torch import nn


class Padded(nn.Module):
    """A transformer that looks away from padding, which the tokens tell, and a mean over what is none."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
        self.table, self.fc = nn.Embedding(11, 6), nn.Linear(6, 3)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        h, there = self.encoder(self.table(x), src_key_padding_mask=x == 0), (x != 0).unsqueeze(-1)
        return self.fc((h * there).sum(1) / there.sum(1).clamp(min=1))


class Windows(nn.Module):
    """Kim's convolutions, each over all columns of several words."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(11, 5, padding_idx=0), nn.Linear(8, 3)
        self.convs = nn.ModuleList(nn.Conv2d(1, 4, (k, 5)) for k in (2, 3))

    def forward(self, x):
        x = self.table(x).unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        return self.fc(torch.cat([F.max_pool1d(own, own.size(2)).squeeze(2) for own in x], 1))


class Bag(nn.Module):
    """fastText."""

    def __init__(self, mode="mean"):
        super().__init__()
        self.table, self.fc = nn.EmbeddingBag(11, 5, mode=mode), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.table(x))


class LastOfBothWays(nn.Module):
    """The last states of the last layer's two directions, side by side."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(11, 5), nn.Linear(12, 3)
        self.states = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        every, (h, _) = self.states(self.table(x))
        return self.fc(torch.cat([h[-2], h[-1], every.max(1)[0][:, :4]], 1))


class Rotary(nn.Module):
    """Positions as turns of complex numbers (LLaMA)."""

    def __init__(self):
        super().__init__()
        self.table, self.qkv, self.fc = nn.Embedding(11, 8), nn.Linear(8, 24, bias=False), nn.Linear(8, 3)
        turns = torch.outer(torch.arange(6.0), 10.0 ** -torch.arange(2.0))
        self.register_buffer("turns", torch.polar(torch.ones_like(turns), turns), persistent=False)

    def turned(self, x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns.view(1, 6, 1, 2)).flatten(3).type_as(x)

    def forward(self, x):
        q, k, v = (own.view(-1, 6, 2, 4) for own in self.qkv(self.table(x)).split(8, 2))
        q, k = self.turned(q), self.turned(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.fc(y.transpose(1, 2).flatten(2).mean(1))


class Halves(Rotary):
    """The same as sines and cosines that turn one half of a head with the other, of queries and keys in one layer."""

    def turned(self, x):
        turns = torch.view_as_real(self.turns).permute(2, 0, 1).repeat(1, 1, 2)
        return x * turns[0] + torch.cat([-x[..., 2:], x[..., :2]], -1) * turns[1]

    def forward(self, x):
        q, k, v = self.qkv(self.table(x)).reshape(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.fc(y.transpose(1, 2).flatten(2).mean(1))


class OfThree(nn.Module):
    """Linear attention as one contraction of three values; learned queries that are contracted too."""

    def __init__(self):
        super().__init__()
        self.table, self.qkv, self.fc = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.query, self.key, self.value = (
            nn.Parameter(torch.randn(1, 2, 8)),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        q, k, v = (own.view(-1, 6, 2, 4) for own in self.qkv(self.table(x)).chunk(3, 2))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = torch.einsum("bnhd,bmhd,bmhe->bnhe", q, k, v).flatten(2)
        scores = torch.einsum("bid,bjd->bij", self.query.expand(len(x), -1, -1), self.key(y)).softmax(1)
        return self.fc(torch.einsum("bjd,bij->bid", self.value(y), scores).mean(1))


class OneHot(nn.Module):
    """Letters as ones and zeros, beside a table of them (Zhang 2015)."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.fc = nn.Embedding(11, 4), nn.Conv1d(15, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        letters = F.one_hot(x, 11).permute(0, 2, 1).to(self.table.weight)
        return self.fc(F.relu(self.conv(torch.cat([letters, self.table(x).mT], 1))).amax(2))


class Documents(nn.Module):
    """Hierarchical attention (Yang 2016): words of each sentence, then sentences of each document."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(11, 6), nn.Linear(8, 3)
        self.words, self.sentences = (
            nn.GRU(width, 4, batch_first=True, bidirectional=True) for width in (6, 8)
        )
        self.maps = nn.ModuleList(nn.Linear(8, 5) for _ in range(2))
        self.contexts = nn.ModuleList(nn.Linear(5, 1, bias=False) for _ in range(2))

    def attend(self, i, x):
        return (self.contexts[i](torch.tanh(self.maps[i](x))).softmax(1) * x).sum(1)

    def forward(self, x):
        x, n = x.view(-1, 3, 2), len(x)
        y = self.attend(0, self.words(self.table(x.reshape(n * 3, 2)))[0])
        return self.fc(self.attend(1, self.sentences(y.view(n, 3, 8))[0]))


TEXT = (6,)
TEXTS = {
    "padding of texts": (Padded, TEXT),
    "windows of words": (Windows, TEXT),
    "bags of words": (Bag, TEXT),
    "largest of a bag": (lambda: Bag("max"), TEXT),
    "last states of both ways": (LastOfBothWays, TEXT),
    "complex turns": (Rotary, TEXT),
    "turned halves": (Halves, TEXT),
    "products of three": (OfThree, TEXT),
    "letters as ones": (OneHot, TEXT),
    "sentences of documents": (Documents, TEXT),
}
