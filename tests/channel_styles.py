"""Small networks whose layers look at all channels, or at neighbours among them: (constructor, shape of an image)."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE = (3, 8, 8)


class ResponseNorm(nn.Module):
    """Global response normalisation, channels last: each channel's length over the mean of all of them."""

    def __init__(self, width):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x):
        lengths = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        ratio = lengths / (lengths.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * ratio) + self.beta + x


class ResponseNorm2d(nn.Module):
    """The same, channels first, with one vector each."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        lengths = x.norm(p=2, dim=(2, 3), keepdim=True)
        ratio = lengths / (lengths.mean(dim=1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * ratio)


class HandNorm(nn.Module):
    """A layer norm of channels in the first place, written by hand."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        middle = x.mean(1, keepdim=True)
        spread = (x - middle).pow(2).mean(1, keepdim=True)
        x = (x - middle) / torch.sqrt(spread + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNextV2(nn.Module):
    """A block of ConvNeXt v2."""

    def __init__(self, last):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 2, 2), HandNorm(6)
        self.depth, self.fc, self.last = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.Linear(6, 3), last
        if last:
            self.one, self.grn, self.two = nn.Linear(6, 10), ResponseNorm(10), nn.Linear(10, 6)
        else:
            self.one, self.grn, self.two = nn.Conv2d(6, 10, 1), ResponseNorm2d(10), nn.Conv2d(10, 6, 1)

    def forward(self, x):
        x = self.norm(self.stem(x))
        y = self.depth(x)
        y = y.permute(0, 2, 3, 1) if self.last else y
        y = self.two(self.grn(F.gelu(self.one(y))))
        return self.fc((x + (y.permute(0, 3, 1, 2) if self.last else y)).mean((2, 3)))


class Spreads(nn.Module):
    """Norms by a variance, a largest value and a length over all channels, one of places and channels together."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.fc = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        var, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
        x = (x - mean) * (var + 1e-5).rsqrt() + x / (1 + x.amax(1, keepdim=True).abs())
        x = self.one(x / x.norm(dim=1, keepdim=True)) + 0.1
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.fc((x / (x.abs().sum(1, keepdim=True) + 1)).mean((2, 3)))


class Efficient(nn.Module):
    """ECA: a gate by a convolution along the channels, which neighbours must stay for."""

    def __init__(self, seen=1, bias=False):
        super().__init__()
        self.stem, self.bn, self.one = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.conv, self.two, self.fc = (
            nn.Conv1d(seen, 1, 3, padding=1, bias=bias),
            nn.Conv2d(5, 6, 1),
            nn.Linear(6, 3),
        )
        self.seen = seen

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.two(F.relu(self.one(x)))
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        if self.seen == 2:
            y = torch.cat([y, x.amax((2, 3))[:, None]], 1)
        y = self.conv(y).transpose(-1, -2).unsqueeze(-1)
        return self.fc((x * y.sigmoid().expand_as(x)).mean((2, 3)))


class Context(nn.Module):
    """MobileViT v2: one score for each place weighs keys, and their sum is for all places of the values."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 11, 1)
        self.out, self.fc = nn.Conv2d(5, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        query, key, value = torch.split(self.qkv(x).flatten(2), [1, 5, 5], dim=1)
        context = (key * query.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        y = (F.relu(value) * context.expand_as(value)).view(len(x), 5, 4, 4)
        return self.fc((x + self.out(y)).mean((2, 3)))


class Focal(nn.Module):
    """FocalNet: contexts of growing size, each times a gate that is one channel of the layer before."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.h = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 15, 1), nn.Conv2d(6, 6, 1)
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, k, padding=k // 2, groups=6) for k in (3, 5))
        self.proj, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        query, context, gates = torch.split(self.f(x), (6, 6, 3), 1)
        whole = 0
        for level, layer in enumerate(self.layers):
            context = F.gelu(layer(context))
            whole = whole + context * gates[:, level : level + 1]
        whole = whole + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, 2:]
        return self.fc((x + self.proj(query * self.h(whole))).mean((2, 3)))


class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of each head, whose queries and keys have unit length over the places."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 24), nn.Linear(8, 6)
        self.temperature, self.fc = nn.Parameter(torch.ones(2, 1, 1)), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.fc((x + self.proj((attn @ v).permute(0, 3, 1, 2).reshape(n, t, 8))).mean(1))


class LinearAttention(nn.Module):
    """EfficientViT and CoaT: keys with values first, which the queries of each head then read."""

    def __init__(self, ones=False):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 24), nn.Linear(8, 6)
        self.fc, self.ones = nn.Linear(6, 3), ones

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.ones:
            q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 1), value=1.0)
            y = q @ (k.transpose(-1, -2) @ v)
            y = y[..., :-1] / (y[..., -1:] + 1e-3)
        else:
            y = q @ (k.softmax(dim=2).transpose(-1, -2) @ v)
        return self.fc((x + self.proj(y.transpose(1, 2).reshape(n, t, 8))).mean(1))


class Repeated(nn.Module):
    """GCViT: one query for all windows of an image; its layer runs in a region of its own precision."""

    def __init__(self):
        super().__init__()
        self.stem, self.q, self.kv = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 8), nn.Linear(6, 16)
        self.proj, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        n = len(x)
        q = self.q(F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2))
        x = x.view(n, 6, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 6)
        q = q.repeat_interleave(len(x) // n, dim=0).view(-1, 4, 2, 4).transpose(1, 2)
        k, v = self.kv(x).view(-1, 4, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, 8)
        return self.fc((x + self.proj(y)).view(n, -1, 6).mean(1))


class TalkingHeads(nn.Module):
    """CaiT: linear maps over the heads before and behind the softmax; a class token reads the others."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 24), nn.Linear(8, 6)
        self.before, self.behind, self.fc = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(6, 3)
        self.q, self.kv, self.token = nn.Linear(6, 8), nn.Linear(6, 16), nn.Parameter(torch.zeros(1, 1, 6))
        self.last, self.gamma = nn.Linear(8, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 0.5, qkv[1], qkv[2]
        attn = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = self.behind(attn.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.gamma * self.proj((attn @ v).transpose(1, 2).reshape(n, t, 8))
        token = self.token.expand(n, -1, -1)
        seen = torch.cat((token, x), dim=1)
        q = self.q(seen[:, 0]).unsqueeze(1).reshape(n, 1, 2, 4).permute(0, 2, 1, 3)
        k, v = self.kv(seen).reshape(n, t + 1, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 1, 8)
        return self.fc((token + self.gamma * self.last(y))[:, 0])


class SingleHead(nn.Module):
    """SHViT: one head on some of the channels, places last, values in front of the turned scores."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.qkv = nn.Conv2d(3, 9, 2, 2), nn.GroupNorm(1, 5), nn.Conv2d(5, 13, 1)
        self.proj, self.fc = nn.Conv2d(9, 9, 1), nn.Linear(9, 3)

    def forward(self, x):
        x = self.stem(x)
        some, rest = torch.split(x, [5, 4], dim=1)
        q, k, v = (y.flatten(2) for y in torch.split(self.qkv(self.norm(some)), [4, 4, 5], dim=1))
        attn = ((q.transpose(-2, -1) @ k) * 0.5).softmax(dim=-1)
        some = (v @ attn.transpose(-2, -1)).reshape(len(x), 5, 4, 4)
        return self.fc((x + self.proj(F.relu(torch.cat([some, rest], dim=1)))).mean((2, 3)))


class Outlook(nn.Module):
    """VOLO: each place says with which weights the places of its window see each other; windows are added up."""

    def __init__(self, heads=2, stride=1):
        super().__init__()
        self.heads, self.stem, self.v = heads, nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 8)
        self.attn, self.proj, self.fc = nn.Linear(6, 81 * heads), nn.Linear(8, 6), nn.Linear(6, 3)
        self.unfold, self.pool = nn.Unfold(3, padding=1, stride=stride), nn.AvgPool2d(stride, stride)

    def forward(self, x):
        x = self.stem(x)
        n, _, h, w = x.shape
        seen = self.pool(x).permute(0, 2, 3, 1)
        places = seen.shape[1] * seen.shape[2]
        x = x.permute(0, 2, 3, 1)
        v = self.unfold(self.v(x).permute(0, 3, 1, 2))
        v = v.reshape(n, self.heads, 8 // self.heads, 9, places).permute(0, 1, 4, 3, 2)
        attn = self.attn(seen).reshape(n, places, self.heads, 9, 9).permute(0, 2, 1, 3, 4)
        y = ((attn * 0.5).softmax(dim=-1) @ v).permute(0, 1, 4, 3, 2).reshape(n, 72, places)
        y = F.fold(y, (h, w), 3, padding=1, stride=self.unfold.stride)
        return self.fc((x + self.proj(y.permute(0, 2, 3, 1))).mean((1, 2)))


class Factorised(nn.Module):
    """CoaT: keys with values first, and positions told by convolutions of other widths for some of the heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 18), nn.Linear(6, 6)
        self.token, self.fc = nn.Parameter(torch.zeros(1, 1, 6)), nn.Linear(6, 3)
        self.convs = nn.ModuleList(nn.Conv2d(c, c, k, padding=k // 2, groups=c) for c, k in ((2, 3), (4, 5)))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 3, 2).transpose(1, 3).unbind(dim=2)
        y = q @ (k.softmax(2).transpose(-1, -2) @ v)
        seen = v[:, :, 1:].transpose(-1, -2).reshape(n, 6, 4, 4).split([2, 4], 1)
        seen = torch.cat([conv(own) for conv, own in zip(self.convs, seen, strict=True)], 1)
        seen = q[:, :, 1:] * seen.reshape(n, 3, 2, 16).transpose(-1, -2)
        y = 0.5 * y + F.pad(seen, (0, 0, 1, 0, 0, 0))
        return self.fc((x + self.proj(y.transpose(1, 2).reshape(n, t, 6)))[:, 0])


class MultiScale(nn.Module):
    """EfficientViT: heads of queries, keys and values as they are beside heads that have seen their neighbours."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 24, 1), nn.Conv2d(16, 6, 1)
        self.near = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
            nn.Conv2d(24, 24, 1, groups=6, bias=False),
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        n, _, h, w = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.near(qkv)], 1).reshape(n, -1, 12, h * w).transpose(-1, -2)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 1), value=1.0)
        y = q @ (k.transpose(-1, -2) @ v)
        y = y[..., :-1] / (y[..., -1:] + 1e-3)
        return self.fc((x + self.proj(y.transpose(-1, -2).reshape(n, -1, h, w))).mean((2, 3)))


class PooledHeads(nn.Module):
    """MViT v2: one convolution and one norm for all heads, which stand beside the images, and tables of distances."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.stem, self.qkv = heads, nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 24)
        self.pool = nn.Conv2d(8 // heads, 8 // heads, 3, 2, 1, groups=8 // heads, bias=False)
        self.norm, self.proj, self.fc = nn.LayerNorm(8 // heads), nn.Linear(8, 6), nn.Linear(6, 3)
        self.rows, self.columns = (nn.Parameter(torch.randn(7, 8 // heads)) for _ in range(2))

    def pooled(self, x):
        h, c = x.shape[1], x.shape[3]
        x = self.pool(x.reshape(-1, 4, 4, c).permute(0, 3, 1, 2))
        return self.norm(x.reshape(-1, h, c, 4).transpose(2, 3))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = self.pooled(k), self.pooled(v)
        attn = (q * 0.5) @ k.transpose(-2, -1)
        far = torch.arange(4)[:, None] - 2 * torch.arange(2)[None] + 3
        seen = q.reshape(n, self.heads, 4, 4, -1)
        rows = torch.einsum("byhwc,hkc->byhwk", seen, self.rows[far])
        columns = torch.einsum("byhwc,wkc->byhwk", seen, self.columns[far])
        attn[:, :, 0:, 0:] = (
            attn[:, :, 0:, 0:].view(n, -1, 4, 4, 2, 2) + rows.unsqueeze(-1) + columns.unsqueeze(-2)
        ).view(n, -1, 16, 4)
        y = attn.softmax(dim=-1) @ v + q
        return self.fc((x + self.proj(y.transpose(1, 2).reshape(n, t, 8))).mean(1))


CHANNELS = {
    "pooled heads": (PooledHeads, IMAGE),
    "one pooled head": (lambda: PooledHeads(1), IMAGE),
    "factorised": (Factorised, IMAGE),
    "multi-scale": (MultiScale, IMAGE),
    "outlook": (Outlook, IMAGE),
    "outlook with strides": (lambda: Outlook(4, 2), IMAGE),
    "single head, places last": (SingleHead, IMAGE),
    "talking heads": (TalkingHeads, IMAGE),
    "cross covariance": (CrossCovariance, IMAGE),
    "linear attention": (LinearAttention, IMAGE),
    "linear attention with a sum": (lambda: LinearAttention(True), IMAGE),
    "global query": (Repeated, IMAGE),
    "mobilevit v2": (Context, IMAGE),
    "focalnet": (Focal, IMAGE),
    "eca": (Efficient, IMAGE),
    "eca of two": (lambda: Efficient(2, True), IMAGE),
    "convnext v2": (lambda: ConvNextV2(True), IMAGE),
    "convnext v2, channels first": (lambda: ConvNextV2(False), IMAGE),
    "norms by hand": (Spreads, IMAGE),
}
