"""Attention with one head of keys and values for all heads of queries, however it is written."""

import torch
import torch.nn.functional as F
from torch import nn


class OneKey(nn.Module):
    """Multi-query attention; the keys are broadcast over the heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 3)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(8, 4)
        self.proj = nn.Linear(12, 8)

    def attend(self, q, k, v):
        return (q @ k[:, None].mT / 2).softmax(-1) @ v[:, None]

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        y, (n, t, _) = self.norm(x), x.shape
        q = self.q(y).view(n, t, 3, 4).transpose(1, 2)
        y = self.attend(q, self.k(y), self.v(y)).transpose(1, 2).reshape(n, t, 12)
        return self.fc((x + self.proj(y)).mean(1))


class ExpandedKey(OneKey):
    def attend(self, q, k, v):
        k, v = (own[:, None].expand(-1, 3, -1, -1) for own in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class GroupedKey(OneKey):
    def attend(self, q, k, v):
        k, v = (own.unflatten(2, (1, 4)).transpose(1, 2) for own in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class ContractedKey(OneKey):
    def attend(self, q, k, v):
        attn = (torch.einsum("bhnd,bmd->bhnm", q, k) / 2).softmax(-1)
        return torch.einsum("bhnm,bmd->bhnd", attn, v)


class RowsOfHeads(OneKey):
    """Heads and places on one dimension."""

    def attend(self, q, k, v):
        n, h, t, d = q.shape
        attn = (q.reshape(n, h * t, d) @ k.mT / 2).softmax(-1)
        return (attn @ v).view(n, h, t, d)


IMAGE = (3, 8, 8)
KEYS = {
    "one head of keys": (OneKey, IMAGE),
    "one head of keys, expanded": (ExpandedKey, IMAGE),
    "one head of keys, as grouped": (GroupedKey, IMAGE),
    "one head of keys, einsum": (ContractedKey, IMAGE),
    "one head of keys, rows of heads": (RowsOfHeads, IMAGE),
}
