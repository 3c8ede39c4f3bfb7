"""Networks as libraries write them, small: (constructor, shape of an image)."""

import torch
import torch.nn.functional as F
from module_styles import IMAGE
from torch import nn


class Normalised(nn.Module):
    """Statistics and a batch norm of the input itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.norm, self.first, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(F.relu(self.first(self.norm(x - self.mean))).mean((2, 3)))


class Placed(nn.Module):
    """Learned positions are added to a series, whose features are on its last dimension."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 4, 6))
        self.first, self.fc = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.fc(F.relu(self.first(x + self.places)).mean(1))


class Disentangled(nn.Module):
    """DeBERTa v2: heads beside images, and keys and queries of relative places that are repeated for all of them."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(11, 8), nn.Embedding(8, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 3)

    def heads(self, x):
        return x.view(x.size(0), x.size(1), 2, -1).permute(0, 2, 1, 3).contiguous().view(-1, x.size(1), 4)

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        far = torch.arange(6)[:, None] - torch.arange(6)[None]
        at, back = torch.clamp(far + 4, 0, 7)[None], torch.clamp(4 - far, 0, 7)[None]
        keys, queries = (
            self.heads(own(self.places.weight[None])).repeat(q.size(0) // 2, 1, 1) for own in (self.k, self.q)
        )
        scores = torch.bmm(q, k.transpose(-1, -2)) / 2
        index = [own.expand([q.size(0), 6, 6]) for own in (at, back)]
        scores = scores + torch.gather(torch.bmm(q, keys.transpose(-1, -2)), -1, index[0])
        scores = scores + torch.gather(torch.bmm(k, queries.transpose(-1, -2)), -1, index[1]).transpose(
            -1, -2
        )
        share = scores.view(-1, 2, 6, 6).softmax(-1).view(-1, 6, 6)
        y = torch.bmm(share, v).view(-1, 2, 6, 4).permute(0, 2, 1, 3).contiguous()
        return self.fc((x + self.out(y.view(y.size(0), 6, -1))).mean(1))


class MaskUnits(nn.Module):
    """Hiera: heads, of which the first stages have one, ahead of windows; ``fused``: by torch's attention."""

    def __init__(self, heads=1, fused=False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.first, self.qkv = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24)
        self.out, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(len(x), 4, 4, 3, self.heads, -1).permute(3, 0, 4, 2, 1, 5).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * 0.3 @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.fc((x + self.out(y.transpose(1, 3).reshape(len(x), -1, 8))).mean(1))


class Latent(nn.Module):
    """DeepSeek: heads are made of few units, and written beside what all heads have in common."""

    def __init__(self):
        super().__init__()
        self.first, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 7), nn.RMSNorm(5)
        self.q, self.up, self.out, self.fc = (
            nn.Linear(8, 10),
            nn.Linear(5, 14),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.first(x)
        q = self.q(x).view(len(x), 4, 2, 5).transpose(1, 2)
        latent, common = self.down(x).split([5, 2], -1)
        k, v = self.up(self.norm(latent)).view(len(x), 4, 2, 7).transpose(1, 2).split([3, 4], -1)
        keys = k.new_empty(*k.shape[:-1], 5)
        keys[..., :3].copy_(k)
        keys[..., 3:].copy_(common.view(len(x), 1, 4, 2).expand(-1, 2, -1, -1))
        y = F.scaled_dot_product_attention(q, keys, v).transpose(1, 2)
        return self.fc((x + self.out(y.reshape(len(x), 4, 8))).mean(1))


class Spans(nn.Module):
    """ConvBERT: beside heads of attention, kernels over words that each word makes; then a layer in two groups."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.q, self.k, self.v, self.near = (nn.Linear(8, 4) for _ in range(4))
        self.kernel, self.out, self.up = nn.Linear(4, 6), nn.Linear(8, 8), nn.Linear(8, 12)
        self.weight, self.bias = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.zeros(8))

    def grouped(self, x):
        y = x.reshape(-1, 2, 6).permute(1, 0, 2) @ self.weight
        return y.permute(1, 0, 2).reshape(len(x), -1, 8) + self.bias

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = (own(x).view(len(x), -1, 2, 2).transpose(1, 2) for own in (self.q, self.k, self.v))
        kernel = self.kernel(self.q(x) * self.k(x)).reshape(-1, 3, 1).softmax(1)
        near = F.unfold(self.near(x).transpose(1, 2).unsqueeze(-1), (3, 1), padding=(1, 0))
        near = near.transpose(1, 2).reshape(-1, 2, 3) @ kernel
        far = ((q @ k.mT / 2).softmax(-1) @ v).permute(0, 2, 1, 3)
        both = torch.cat([far, near.reshape(len(x), -1, 2, 2)], 2)
        x = x + self.out(both.flatten(2))
        return self.fc((x + self.grouped(F.gelu(self.up(x)))).mean(1))


class Decoder(nn.Module):
    """torch's encoder with a mask that hides what comes later."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.table, self.encoder, self.fc = (
            nn.Embedding(11, 8),
            nn.TransformerEncoder(layer, 1),
            nn.Linear(8, 3),
        )

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1))
        return self.fc(self.encoder(self.table(ids), mask=mask)[:, -1])


LIBRARY = {
    "disentangled attention": (Disentangled, (6,)),
    "one head ahead of windows": (MaskUnits, IMAGE),
    "one head ahead of windows, fused": (lambda: MaskUnits(1, True), IMAGE),
    "heads ahead of windows": (lambda: MaskUnits(2), IMAGE),
    "latent attention": (Latent, (4, 6)),
    "spans of words": (Spans, (6,)),
    "later words hidden": (Decoder, (6,)),
    "norms of the input": (Normalised, IMAGE),
    "positions of the input": (Placed, (4, 6)),
}
