"""Places that are weighed by one number each, or pair by pair: attention pooling, graphs, points, tokens of columns."""

import torch
import torch.nn.functional as F
from torch import nn


class Pooling(nn.Module):
    """Attention over places as text classifiers write it: the one score of each place loses its dimension."""

    def __init__(self, score=1):
        super().__init__()
        self.first, self.score, self.fc = nn.Linear(5, 6), nn.Linear(6, score), nn.Linear(6 * score, 3)

    def weigh(self, h):
        w = torch.softmax(self.score(torch.tanh(h)).squeeze(-1), -1)
        return torch.bmm(w.unsqueeze(1), h).squeeze(1)

    def forward(self, x):
        return self.fc(self.weigh(F.relu(self.first(x))))


class MeanOfPlaces(Pooling):
    """The same as a product and a sum, by a vector of weights."""

    def __init__(self):
        super().__init__()
        self.score = nn.Parameter(torch.randn(6))

    def weigh(self, h):
        return (h * F.softmax(h @ self.score, 1)[..., None]).sum(1)


class SequencePooling(Pooling):
    """CCT, and bags of instances."""

    def weigh(self, h):
        return torch.matmul(F.softmax(self.score(h), dim=1).transpose(-1, -2), h).squeeze(-2)


class Hops(Pooling):
    """Several sums with weights of their own, side by side."""

    def weigh(self, h):
        return torch.bmm(F.softmax(self.score(h).transpose(2, 1), dim=2), h).flatten(1)


class LastAsQuery(nn.Module):
    """Luong's attention: the last state of a recurrent layer asks all of them."""

    def __init__(self):
        super().__init__()
        self.states, self.fc = nn.GRU(5, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        h, last = self.states(x)
        w = torch.softmax(torch.bmm(h, last[-1].unsqueeze(2)).squeeze(2), 1)
        seen = torch.bmm(h.transpose(1, 2), w.unsqueeze(2)).squeeze(2)
        return self.fc(torch.cat([seen, last[-1]], 1))


class GraphAttention(nn.Module):
    """GAT: a score of every two nodes is the sum of one of each, where an edge is."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(5, 6, bias=False), nn.Linear(6, 3)
        self.here, self.there = nn.Linear(6, 1, bias=False), nn.Parameter(torch.randn(6, 1))
        self.register_buffer("edges", torch.eye(4) + torch.eye(4).roll(1, 0))

    def forward(self, x):
        h = self.first(x)
        e = F.leaky_relu(self.here(h) + torch.matmul(h, self.there).transpose(1, 2), 0.2)
        e = torch.where(self.edges > 0, e, -9e15 * torch.ones_like(e))
        return self.fc(F.elu(torch.matmul(F.softmax(e, dim=2), h)).mean(1))


class PairsOfNodes(nn.Module):
    """GAT as first written: scores of concatenated pairs of nodes; pairs: how these are made."""

    def __init__(self, pairs):
        super().__init__()
        self.first, self.score, self.fc = (
            nn.Linear(5, 6, bias=False),
            nn.Parameter(torch.randn(12, 1)),
            nn.Linear(6, 3),
        )
        self.register_buffer("edges", torch.eye(4) + torch.eye(4).roll(1, 0))
        self.pairs = pairs

    def forward(self, x):
        h = self.first(x)
        e = F.leaky_relu(self.pairs(h, self.score), 0.2)
        e = torch.where(self.edges > 0, e, -9e15 * torch.ones_like(e))
        return self.fc(F.elu(torch.matmul(F.softmax(e, dim=2), h)).mean(1))


def interleaved(h, score):
    pairs = torch.cat([h.repeat_interleave(4, dim=1), h.repeat(1, 4, 1)], dim=-1)
    return (pairs @ score).view(-1, 4, 4)


def in_rows(h, score):
    pairs = torch.cat([h.repeat(1, 1, 4).view(-1, 16, 6), h.repeat(1, 4, 1)], 2).view(-1, 4, 4, 12)
    return torch.matmul(pairs, score).squeeze(3)


def broadcast(h, score):
    pairs = [h.unsqueeze(2).expand(-1, -1, 4, -1), h.unsqueeze(1).expand(-1, 4, -1, -1)]
    return (torch.cat(pairs, -1) @ score)[..., 0]


class OneScore(nn.Module):
    """One score of each place, which is selected, and a number of each."""

    def __init__(self):
        super().__init__()
        self.first, self.score, self.fc = nn.Linear(5, 6), nn.Linear(6, 1), nn.Linear(6, 3)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.fc((x * (self.score(x)[..., 0] + self.bias).sigmoid()[..., None]).mean(1))


class Points(nn.Module):
    """PointNet: a matrix made of all points turns each of them."""

    def __init__(self):
        super().__init__()
        self.seen, self.turn = nn.Conv1d(3, 6, 1), nn.Linear(6, 9)
        self.each, self.norm, self.fc = nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        t = self.turn(F.relu(self.seen(x)).max(2)[0]).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)[None]
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        return self.fc(torch.max(F.relu(self.norm(self.each(x))), 2, keepdim=True)[0].view(-1, 5))


class Columns(nn.Module):
    """FT-Transformer: every column of a table is a token, a row of weights times its number."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 3)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        x = x.flatten(1)[:, :, None] * self.weight[None] + self.bias[None]
        return self.fc(self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])


class LargestPutBack(nn.Module):
    """The largest channel of each place, by name and by number."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        near = torch.max(x, 1)[0].unsqueeze(1) - x.min(1).values.view(-1, 1, 6, 6)
        return self.fc((x * near.sigmoid()).mean((2, 3)))


class Bilinear(nn.Module):
    """Bilinear pooling: products of all pairs of channels of two maps, over places."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Linear(20, 3)

    def forward(self, x):
        a, b = F.relu(self.one(x)).flatten(2), F.relu(self.other(x)).flatten(2)
        return self.fc(torch.bmm(a, b.transpose(1, 2)).flatten(1) / a.size(2))


class Edges(nn.Module):
    """Chebyshev's polynomials of a graph's edges, on the input and on what a layer gives; a norm of each node."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.randn(7, 7) / 4)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3, 6) / 2), nn.Parameter(torch.zeros(7))
        self.second, self.norm, self.fc = nn.Linear(6, 5), nn.BatchNorm1d(7), nn.Linear(5, 3)

    def forward(self, x):
        x = x.transpose(1, 2)
        once = self.edges @ x
        steps = (x, once, 2 * (self.edges @ once) - x)
        x = F.relu(
            sum(own @ weight for own, weight in zip(steps, self.weight, strict=True)) + self.bias[:, None]
        )
        return self.fc(F.relu(self.norm(self.edges @ self.second(x))).mean(1))


class BothWays(nn.Module):
    """What a map over places gives meets, entry by entry, the units of a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.across, self.along = nn.Conv1d(3, 7, 1), nn.Linear(7, 7), nn.Linear(7, 7)
        self.last, self.fc = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.fc(F.relu(self.last(self.across(x) + self.along(x.transpose(1, 2)))).mean(1))


class Messages(nn.Module):
    """Messages along edges that are a list of pairs, added up at the nodes where these end (PyG, DGL)."""

    PAIRS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, 0, 3, 5]])

    def __init__(self):
        super().__init__()
        self.register_buffer("pairs", self.PAIRS)
        self.first, self.message = nn.Linear(3, 6), nn.Linear(12, 6)
        self.own, self.fc = nn.Linear(6, 5), nn.Linear(5, 3)

    def added(self, x, found):
        return torch.zeros_like(x).index_add_(1, self.pairs[1], found)

    def forward(self, x):
        x = F.relu(self.first(x.transpose(1, 2)))
        start, end = self.pairs
        found = F.relu(self.message(torch.cat([x[:, start], x[:, end]], 2)))
        return self.fc(F.relu(self.own(x + self.added(x, found))).mean(1))


class ScatteredMessages(Messages):
    """The same by scatter_add; the mean of what arrives."""

    def added(self, x, found):
        at = self.pairs[1].view(1, -1, 1).expand_as(found)
        count = torch.zeros(7, device=x.device).index_add(0, self.pairs[1], torch.ones(9, device=x.device))
        return x.new_zeros(len(x), 7, 6).scatter_add(1, at, found) / count[:, None]


class Sampled(Messages):
    """GraphSAGE: the mean and the largest of the neighbours that a table names."""

    NEAR = ((1, 2), (0, 3), (4, 5), (6, 0), (1, 3), (2, 2), (5, 0))

    def forward(self, x):
        x = F.relu(self.first(x.transpose(1, 2)))
        near = x[:, torch.tensor(self.NEAR)]
        x = F.relu(self.message(torch.cat([near.mean(2), near.amax(2)], 2)))
        return self.fc(F.relu(self.own(x)).mean(1))


PLACES = {
    "attention over places": (Pooling, (4, 5)),
    "attention by a vector": (MeanOfPlaces, (4, 5)),
    "sequence pooling": (SequencePooling, (4, 5)),
    "several hops": (lambda: Hops(2), (4, 5)),
    "last state as query": (LastAsQuery, (4, 5)),
    "graph attention": (GraphAttention, (4, 5)),
    "graph attention, interleaved": (lambda: PairsOfNodes(interleaved), (4, 5)),
    "graph attention, in rows": (lambda: PairsOfNodes(in_rows), (4, 5)),
    "graph attention, broadcast": (lambda: PairsOfNodes(broadcast), (4, 5)),
    "one score of each place": (OneScore, (4, 5)),
    "points that are turned": (Points, (3, 7)),
    "columns as tokens": (Columns, (4, 1)),
    "bilinear pooling": (Bilinear, (3, 8, 8)),
    "largest of all channels": (LargestPutBack, (3, 8, 8)),
    "edges of a graph": (Edges, (3, 7)),
    "maps both ways": (BothWays, (3, 7)),
    "messages along edges": (Messages, (3, 7)),
    "scattered messages": (ScatteredMessages, (3, 7)),
    "neighbours of a table": (Sampled, (3, 7)),
}
