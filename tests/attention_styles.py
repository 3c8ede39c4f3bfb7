"""Attention with tables inside heads, heads beside images, and what stands in its place: (constructor, shape)."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, TEXT = (3, 8, 8), (6,)


class OnMaps(nn.Module):
    """A body between two convolutions beside a stream of 4 x 4 places, and a head."""

    def __init__(self, body, wide=8):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 6, 2, 2), nn.BatchNorm2d(6), body
        self.out, self.fc = nn.Conv2d(wide, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(F.relu(x + self.out(self.body(self.norm(x)))).mean((2, 3)))


class OnTokens(nn.Module):
    """The same of tokens."""

    def __init__(self, body, wide=8):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6), body
        self.out, self.fc = nn.Linear(wide, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.fc(F.relu(x + self.out(self.body(self.norm(x)))).mean(1))


def absolute(x):
    """BoTNet's change from relative to absolute places, by padding and a view: (n, heads, l, 2 l - 1)."""
    n, heads, length, _ = x.shape
    x = torch.cat((x, torch.zeros((n, heads, length, 1), dtype=x.dtype)), dim=3).reshape(n, heads, -1)
    x = torch.cat((x, torch.zeros((n, heads, length - 1), dtype=x.dtype)), dim=2)
    return x.reshape(n, heads, length + 1, 2 * length - 1)[:, :, :length, length - 1 :]


class RelativeLogits(nn.Module):
    """BoTNet: a table of relative places for all heads, along both sides of a map."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(6, 24, 1, bias=False)
        self.rel_height, self.rel_width = (nn.Parameter(torch.randn(7, 4) / 2) for _ in range(2))

    def along(self, q, table):
        n, heads, h, w, _ = q.shape
        logits = torch.einsum("bhxyd,rd->bhxyr", q, table).reshape(n, heads * h, w, 2 * w - 1)
        logits = absolute(logits).reshape(n, heads, h, 1, w, w)
        return logits.expand(-1, -1, -1, h, -1, -1)

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (own.reshape(n, 2, 4, h * w).transpose(2, 3) for own in self.qkv(x).chunk(3, 1))
        grid = (q * 0.5).reshape(n, 2, h, w, 4)
        seen = self.along(grid, self.rel_width).permute(0, 1, 2, 4, 3, 5).reshape(n, 2, h * w, h * w)
        turned = self.along(grid.transpose(2, 3), self.rel_height)
        seen = seen + turned.permute(0, 1, 4, 2, 5, 3).reshape(n, 2, h * w, h * w)
        attn = (torch.einsum("bhid,bhjd->bhij", q * 0.5, k) + seen).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", attn, v).transpose(2, 3).reshape(n, 8, h, w)


class BesideImages(RelativeLogits):
    """timm's BoTNet: heads, and then rows of a map, on the dimension of the images."""

    def along(self, q, table):
        n, h, w, _ = q.shape
        x = F.pad((q @ table.transpose(-1, -2)).reshape(-1, w, 2 * w - 1), [0, 1]).flatten(1)
        x = F.pad(x, [0, w - 1]).reshape(-1, w + 1, 2 * w - 1)[:, :w, w - 1 :]
        return x.reshape(n, h, 1, w, w).expand(-1, -1, h, -1, -1)

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (own.reshape(n * 2, 4, h * w) for own in self.qkv(x).chunk(3, 1))
        q, v = q.transpose(1, 2), v.transpose(1, 2)
        grid = q.reshape(n * 2, h, w, -1)
        seen = self.along(grid, self.rel_width).permute(0, 1, 3, 2, 4)
        seen = seen + self.along(grid.transpose(1, 2), self.rel_height).permute(0, 3, 1, 4, 2)
        attn = ((q @ k) * 0.5 + seen.reshape(n * 2, h * w, h * w)).softmax(-1)
        return (attn @ v).transpose(1, 2).reshape(n, 8, h, w)


class TablesOfHeads(RelativeLogits):
    """A table of places for each head in front of the queries."""

    def __init__(self):
        super().__init__()
        self.rel_height = nn.Parameter(torch.randn(1, 2, 4, 1, 4))
        self.rel_width = nn.Parameter(torch.randn(1, 2, 4, 4, 1))

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (own.reshape(n, 2, 4, -1) for own in self.qkv(x).chunk(3, 1))
        table = (self.rel_height + self.rel_width).view(1, 2, 4, -1).permute(0, 1, 3, 2)
        attn = (q.permute(0, 1, 3, 2) @ k + table @ q).softmax(-1)
        return (v @ attn.permute(0, 1, 3, 2)).view(n, 8, h, w)


class Halo(nn.Module):
    """HaloNet: blocks that look at windows around them."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Conv2d(6, 8, 1, bias=False), nn.Conv2d(6, 16, 1, bias=False)

    def forward(self, x):
        n = len(x)
        q = self.q(x).reshape(-1, 4, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(n * 2, 4, -1, 4).transpose(1, 3)
        kv = F.pad(self.kv(x), [1, 1, 1, 1]).unfold(2, 4, 2).unfold(3, 4, 2)
        k, v = torch.split(kv.reshape(n * 2, 8, 4, -1).permute(0, 2, 3, 1), [4, 4], dim=-1)
        y = (((q @ k.transpose(-1, -2)) * 0.5).softmax(-1) @ v).transpose(1, 3)
        return y.reshape(-1, 2, 2, 2, 2).permute(0, 3, 1, 4, 2).reshape(n, 8, 4, 4)


class LocalWindows(nn.Module):
    """Twins: windows, and then heads, on the dimension of the images."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(6, 24, 1, bias=False)

    def forward(self, x):
        n, c = x.shape[:2]
        x = x.reshape(n, c, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, 2, 2)
        q, k, v = self.qkv(x).chunk(3, 1)
        q, k, v = (y.reshape(n * 4, 2, 4, 4).transpose(2, 3).reshape(n * 8, 4, 4) for y in (q, k, v))
        y = (torch.einsum("bid,bjd->bij", q, k) * 0.5).softmax(-1)
        y = torch.einsum("bij,bjd->bid", y, v).reshape(n, 2, 2, 2, 2, 2, 4)
        return y.permute(0, 3, 6, 1, 4, 2, 5).reshape(n, 8, 4, 4)


class WindowTokens(nn.Module):
    """SepViT: a token of each window, which the windows see each other by."""

    def __init__(self):
        super().__init__()
        self.qkv, self.token = nn.Conv1d(6, 24, 1, bias=False), nn.Parameter(torch.randn(6))
        self.norm, self.each = nn.LayerNorm(4), nn.Conv1d(8, 16, 1)

    def forward(self, x):
        n, c = x.shape[:2]
        x = x.reshape(n, c, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, 4)
        x = torch.cat((self.token[None, :, None].expand(n * 4, -1, -1), x), -1)
        q, k, v = (y.reshape(n * 4, 2, 4, 5).transpose(2, 3) for y in self.qkv(x).chunk(3, 1))
        y = ((q @ k.transpose(2, 3)) * 0.5).softmax(-1) @ v
        windows = y[:, :, 1:].reshape(n, 4, 2, 4, 4).permute(0, 2, 1, 3, 4)
        tokens = F.gelu(self.norm(y[:, :, 0].reshape(n, 4, 2, 4).permute(0, 2, 1, 3)))
        tokens = self.each(tokens.permute(0, 1, 3, 2).reshape(n, 8, 4))
        q, k = (own.reshape(n, 2, 4, 4).transpose(2, 3) for own in tokens.chunk(2, 1))
        y = torch.einsum("bhij,bhjwd->bhiwd", ((q @ k.transpose(2, 3)) * 0.5).softmax(-1), windows)
        return y.reshape(n, 2, 2, 2, 2, 2, 4).permute(0, 1, 6, 2, 4, 3, 5).reshape(n, 8, 4, 4)


class Lambda(nn.Module):
    """LambdaNet: keys with values first, which all heads of queries read; places by a convolution of the values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.places = nn.Conv2d(6, 15, 1, bias=False), nn.Conv3d(1, 3, (3, 3, 1), padding=(1, 1, 0))

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = torch.split(self.qkv(x), [6, 3, 6], 1)
        q, k = q.reshape(n, 2, 3, h * w).transpose(-1, -2), k.reshape(n, 3, h * w).softmax(-1)
        v = v.reshape(n, 6, h * w).transpose(-1, -2)
        seen = q @ (k @ v).unsqueeze(1)
        near = self.places(v.reshape(n, 1, h, w, 6)).reshape(n, 1, 3, h * w, 6).transpose(2, 3)
        y = seen + (q.unsqueeze(-2) @ near).squeeze(-2)
        return y.transpose(-1, -2).reshape(n, 12, h, w)


class Heads(nn.Module):
    """Two heads of four units, whose attention is something else in each kind."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 24)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class RandomFeatures(Heads):
    """Performer: kernels of a projection that all heads have in common."""

    def __init__(self):
        super().__init__()
        self.register_buffer("projection", torch.randn(5, 4))

    def features(self, x, over):
        projection = self.projection[None, None].expand(*x.shape[:2], -1, -1)
        seen = torch.einsum("...id,...jd->...ij", x, projection)
        return torch.exp(seen - (x**2).sum(-1, keepdim=True) / 2 - seen.amax(over, keepdim=True)) + 1e-4

    def attend(self, q, k, v):
        q, k = self.features(q, -1), self.features(k, (-1, -2))
        scale = 1 / torch.einsum("...nd,...d->...n", q, k.sum(-2))
        return torch.einsum("...de,...nd,...n->...ne", torch.einsum("...nd,...ne->...de", k, v), q, scale)


class Synthesizer(Heads):
    """Scores that each head makes of its queries alone, or that are learned."""

    def __init__(self, learned):
        super().__init__()
        self.learned = learned
        self.scores = nn.Parameter(torch.randn(2, 16, 16) if learned else torch.randn(4, 16))

    def attend(self, q, k, v):
        return (self.scores if self.learned else F.relu(q) @ self.scores).softmax(-1) @ v


class RelativeKeys(nn.Module):
    """Keys by how far places are apart, for every pair of them, or by a view that skews (music transformer)."""

    def __init__(self, skewed):
        super().__init__()
        self.skewed, self.table, self.qkv = skewed, nn.Embedding(11, 8), nn.Linear(8, 24)
        self.far, self.fc = nn.Parameter(torch.randn(6 if skewed else 11, 4)), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(self.table(x)).chunk(3, -1))
        n, h, t, _ = q.shape
        if self.skewed:
            seen = F.pad(torch.matmul(q, self.far.transpose(0, 1)), (1, 0)).reshape(n, h, t + 1, t)[:, :, 1:]
        else:
            steps = torch.arange(t)
            seen = torch.einsum("bhid,ijd->bhij", q, self.far[steps[None] - steps[:, None] + 5])
        return self.fc(((q @ k.mT + seen).softmax(-1) @ v).transpose(1, 2).flatten(2).mean(1))


class MapsOfHeads(nn.Module):
    """One linear map for all heads, ahead of queries, keys and values each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=bias) for bias in (False, True, True))

    def forward(self, x):
        x = self.first(x).reshape(len(x), -1, 2, 4)
        attn = torch.einsum("nqhd,nkhd->nhqk", self.q(x), self.k(x)).div(2).softmax(3)
        return torch.einsum("nhql,nlhd->nqhd", attn, self.v(x)).flatten(2)


class ExternalHeads(nn.Module):
    """EANet: memories that all heads have in common."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.first(x).unflatten(-1, (2, 4)).permute(0, 2, 1, 3)
        attn = self.one(x).softmax(-2)
        return self.two(attn / (1e-9 + attn.sum(-1, keepdim=True))).permute(0, 2, 1, 3).flatten(2)


class AttentionFree(nn.Module):
    """AFT: a learned number for every two places."""

    def __init__(self):
        super().__init__()
        self.qkv, self.places = nn.Linear(6, 24), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = torch.exp(self.places[: x.shape[1], : x.shape[1]].unsqueeze(0))
        return torch.sigmoid(q) * ((seen @ (torch.exp(k) * v)) / (seen @ torch.exp(k)))


class GatesOfHeads(nn.Module):
    """gMLP whose heads have each a map over places."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(8)
        self.weight, self.bias = nn.Parameter(torch.randn(2, 16, 16) / 4), nn.Parameter(torch.ones(2, 16))

    def forward(self, x):
        kept, gate = F.gelu(self.first(x)).chunk(2, -1)
        gate = self.norm(gate).unflatten(-1, (2, 4)).transpose(1, 2)
        gate = torch.einsum("bhnd,hmn->bhmd", gate, self.weight) + self.bias[:, :, None]
        return gate.transpose(1, 2).flatten(2) * kept


class SetAttention(nn.Module):
    """Set transformers: heads are put beside the images by splitting and joining."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = (torch.cat(own(x).split(4, 2), 0) for own in (self.q, self.k, self.v))
        y = q + torch.softmax(q.bmm(k.transpose(1, 2)) / 2, 2).bmm(v)
        return self.norm(torch.cat(y.split(len(x), 0), 2))


class WeighedPlaces(nn.Module):
    """Windows with a token each, whose places einsums weigh by scores, entry by entry and summed (einops)."""

    def __init__(self):
        super().__init__()
        self.token, self.gate, self.score = nn.Parameter(torch.randn(6)), nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x):
        n = len(x)
        x = torch.einsum("bnd,bn->bnd", x, self.gate(x).view(n, 16).sigmoid()).reshape(n * 4, 4, 6)
        x = torch.cat((self.token[None].expand(n * 4, 6).unsqueeze(1), x), 1)
        y = torch.einsum("b n, b n d -> b d", self.score(x).squeeze(-1).softmax(-1), x)
        return y.view(n, 4, 1, 6).expand(-1, -1, 4, -1).reshape(n, 16, 6)


def maps(make, wide=8):
    return lambda: OnMaps(make(), wide), IMAGE


def tokens(make, wide=8):
    return lambda: OnTokens(make(), wide), IMAGE


ATTENTION = {
    "relative logits": maps(RelativeLogits),
    "relative logits, heads beside images": maps(BesideImages),
    "tables of heads": maps(TablesOfHeads),
    "windows around blocks": maps(Halo),
    "windows and heads beside images": maps(LocalWindows),
    "tokens of windows": maps(WindowTokens),
    "lambda layer": maps(Lambda, 12),
    "lambda layer, then blocks": maps(lambda: nn.Sequential(Lambda(), nn.Conv2d(12, 6, 1), Halo())),
    "random features": tokens(RandomFeatures),
    "synthesizer": tokens(lambda: Synthesizer(False)),
    "random synthesizer": tokens(lambda: Synthesizer(True)),
    "relative keys": (lambda: RelativeKeys(False), TEXT),
    "relative keys, skewed": (lambda: RelativeKeys(True), TEXT),
    "one map for all heads": tokens(MapsOfHeads),
    "external attention": tokens(ExternalHeads),
    "attention free": tokens(AttentionFree),
    "gates of heads": tokens(GatesOfHeads),
    "places weighed by einsum": tokens(WeighedPlaces, 6),
    "heads split and joined": tokens(SetAttention),
}
