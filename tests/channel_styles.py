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


CHANNELS = {
    "mobilevit v2": (Context, IMAGE),
    "focalnet": (Focal, IMAGE),
    "eca": (Efficient, IMAGE),
    "eca of two": (lambda: Efficient(2, True), IMAGE),
    "convnext v2": (lambda: ConvNextV2(True), IMAGE),
    "convnext v2, channels first": (lambda: ConvNextV2(False), IMAGE),
    "norms by hand": (Spreads, IMAGE),
}
