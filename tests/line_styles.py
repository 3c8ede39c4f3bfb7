"""Networks whose layers sample, sort, sum up or weigh places, or have attention in one head: (constructor, shape)."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE = (3, 8, 8)


class Around(nn.Module):
    """A convolution, ``body``, another convolution, a head."""

    def __init__(self, body, width=4, **modules):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(width, 5, 3),
            nn.Linear(5, 3),
        )
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(F.relu(self.second(self.body(self, self.first(x)))).mean((2, 3)))


class Transformer(nn.Module):
    """As the spatial transformer of the tutorials: the image itself is sampled where a small network says."""

    def __init__(self):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.ReLU(True))
        self.where = nn.Sequential(nn.Linear(54, 8), nn.ReLU(True), nn.Linear(8, 6))
        self.conv, self.one, self.two = nn.Conv2d(3, 6, 3), nn.Linear(54, 7), nn.Linear(7, 3)

    def forward(self, x):
        theta = self.where(self.look(x).view(-1, 54)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False)
        x = F.relu(F.max_pool2d(self.conv(x), 2)).view(-1, 54)
        return F.log_softmax(self.two(F.relu(self.one(x))), dim=1)


class Experts(nn.Module):
    """A mixture of experts whose gates are softmaxed and whose outputs are stacked."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Conv2d(4, 5, 3) for _ in range(2))

    def forward(self, x):
        x = F.relu(self.stem(x))
        gates = self.gate(x.mean((2, 3))).softmax(1)
        found = torch.stack([own(x) for own in self.experts], 1) * gates[:, :, None, None, None]
        return self.head(F.relu(found.sum(1)).mean((2, 3)))


class LargestGates(nn.Module):
    """A mixture of the two experts of the largest gates (Shazeer 2017); kind: how the others' gates become zero."""

    def __init__(self, kind="written"):
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Linear(5, 3)
        self.experts, self.kind = nn.ModuleList(nn.Conv2d(4, 5, 3) for _ in range(3)), kind

    def gates(self, scores):
        if self.kind == "sparsemax":  # Martins and Astudillo 2016
            ranked = scores.sort(1, descending=True)[0]
            sums, ranks = ranked.cumsum(1) - 1, torch.arange(1, 4, device=scores.device)
            kept = (ranks * ranked > sums).sum(1, keepdim=True)
            return (scores - sums.gather(1, kept - 1) / kept.to(scores.dtype)).clamp(min=0)
        largest, chosen = scores.topk(2, dim=1)
        if self.kind == "written":
            return torch.zeros_like(scores).scatter(1, chosen, largest.softmax(1))
        if self.kind == "softmaxed":
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, largest).softmax(1)
        return scores.softmax(1) * torch.zeros_like(scores).scatter_(1, chosen, 1.0)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gates = self.gates(self.gate(x.mean((2, 3))))
        found = sum(own(x) * gates[:, i, None, None, None] for i, own in enumerate(self.experts))
        return self.head(F.relu(found).mean((2, 3)))


class Llama(nn.Module):
    """A block as of language models: RMSNorm, fewer heads of keys than of queries, gated linear units."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.norms = nn.ModuleList([nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-5)])
        self.q, self.k, self.v, self.o = (nn.Linear(8, n, bias=False) for n in (8, 4, 4, 8))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def heads(self, x):
        return x.unflatten(-1, (-1, 2)).transpose(1, 2)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norms[0](x)
        y = F.scaled_dot_product_attention(
            self.heads(self.q(y)),
            self.heads(self.k(y)),
            self.heads(self.v(y)),
            is_causal=True,
            enable_gqa=True,
        )
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(F.rms_norm(x, (8,)).mean(1))


class Patches(nn.Module):
    """Patches of the image by Tensor.unfold."""

    def __init__(self, size, step):
        super().__init__()
        self.size, self.step = size, step
        self.embed, self.hidden, self.head = nn.Linear(3 * size * size, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = x.unfold(2, self.size, self.step).unfold(3, self.size, self.step)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.head(F.gelu(self.hidden(self.embed(x))).mean(1))


class Linear(nn.Module):
    """Linear attention without heads: keys with values first."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(7, 3)
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 7)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((self.q(x).softmax(-1) @ (self.k(x).softmax(1).mT @ self.v(x))).mean(1))


class Together(nn.Module):
    """Attention by torch.bmm, images and heads on one dimension; sequence, or heads, first."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.embed, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def joined(self, x):
        if self.way == "images":
            return x.view(-1, 16, 2, 4).transpose(1, 2).reshape(-1, 16, 4)
        if self.way == "heads":
            return x.view(-1, 16, 2, 4).permute(2, 0, 1, 3).contiguous().view(-1, 16, 4)
        return x.transpose(0, 1).contiguous().view(16, -1, 4).transpose(0, 1)

    def apart(self, x):
        if self.way == "images":
            return x.view(-1, 2, 16, 4).transpose(1, 2).reshape(-1, 16, 8)
        if self.way == "heads":
            return x.view(2, -1, 16, 4).permute(1, 2, 0, 3).contiguous().view(-1, 16, 8)
        return x.transpose(0, 1).contiguous().view(16, -1, 8).transpose(0, 1)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (self.joined(own(x)) for own in (self.q, self.k, self.v))
        scores = torch.bmm(q * 0.5, k.transpose(1, 2)).masked_fill(torch.ones(16, 16).triu(1).bool(), -1e9)
        return self.head(
            self.o(self.apart(torch.bmm(F.dropout(scores.softmax(-1), 0.1, self.training), v))).mean(1)
        )


def channel_attention(m, x):
    y = x.flatten(2)
    return x + m.scale * ((y @ y.transpose(1, 2)).softmax(-1) @ y).view_as(x)


def global_context(m, x):
    weights = m.mask(x).flatten(2).softmax(-1).transpose(1, 2)
    return x + m.change((x.flatten(2) @ weights)[..., None])


def written_over(m, x):
    y = x.clone()
    y[y < 0] = 0.1
    return y


def spelled(m, x):
    """What torch writes as other calls."""
    x = torch.lerp(x, torch.hstack(x.tensor_split(2, 1)), 0.3) + torch.rot90(x, 1, (2, 3))
    x = torch.sub(x, x.clamp(min=x.tanh() - 1), alpha=2)
    return x / (1 + torch.std_mean(x, (2, 3), keepdim=True)[0]) + torch.where(m.mask, x, x.sin())


LINES = {
    "spatial transformer": (Transformer, IMAGE),
    "mixture of experts": (Experts, IMAGE),
    "largest gates": (LargestGates, IMAGE),
    "largest gates, softmaxed": (lambda: LargestGates("softmaxed"), IMAGE),
    "largest gates, masked": (lambda: LargestGates("masked"), IMAGE),
    "largest gates, sparsemax": (lambda: LargestGates("sparsemax"), IMAGE),
    "rms norm and fewer keys": (Llama, IMAGE),
    "patches side by side": (lambda: Patches(4, 4), IMAGE),
    "patches that overlap": (lambda: Patches(4, 2), IMAGE),
    "linear attention in one head": (Linear, IMAGE),
    "channel attention in one head": (
        lambda: Around(channel_attention, scale=nn.Parameter(torch.tensor(0.4))), IMAGE),
    "context by one mask": (
        lambda: Around(global_context, mask=nn.Conv2d(4, 1, 1), change=nn.Conv2d(4, 4, 1)), IMAGE),
    "images and heads on one dimension": (lambda: Together("images"), IMAGE),
    "heads and images on one dimension": (lambda: Together("heads"), IMAGE),
    "images and heads behind a sequence": (lambda: Together("sequence"), IMAGE),
    "beside nothing": (
        lambda: Around(lambda m, x: torch.cat([x[:, :, :0], x.sin(), x[:, :, 8:].cos()], 2)), IMAGE),
    "a mean that is put back": (
        lambda: Around(lambda m, x: (x - x.mean(1)[:, None]) / (1 + x.var(1).unsqueeze(1))), IMAGE),
    "written over": (lambda: Around(written_over), IMAGE),
    "written by torch": (lambda: Around(spelled, mask=torch.arange(8) > 3), IMAGE),
    "sorted places": (
        lambda: Around(lambda m, x: x.flatten(2).topk(16, 2)[0].cumsum(2).unflatten(2, (4, 4))), IMAGE),
    "norms of instances as of batches": (
        lambda: Around(lambda m, x: m.norm(x), norm=nn.InstanceNorm2d(4, track_running_stats=True)), IMAGE),
}  # fmt: skip
