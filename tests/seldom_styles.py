"""Kinds of networks that are seldom met, as their authors write them: (constructor, shape of an image)."""

import torch
import torch.nn.functional as F
from library_styles import LIBRARY
from module_styles import IMAGE, around
from torch import nn


class FourWays(nn.Module):
    """ODConv: four kernels are mixed, and weighed over their inputs, outputs and taps, for each image."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.channel_fc, self.filter_fc = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.spatial_fc, self.kernel_fc = nn.Conv2d(4, 9, 1), nn.Conv2d(4, 4, 1)
        self.weight = nn.Parameter(torch.randn(4, 8, 8, 3, 3) / 8)

    def forward(self, x):
        b, c, h, w = x.size()
        y = F.relu(self.bn(self.fc(F.adaptive_avg_pool2d(x, 1))))
        channel, out = (torch.sigmoid(own(y).view(b, -1, 1, 1)) for own in (self.channel_fc, self.filter_fc))
        spatial = torch.sigmoid(self.spatial_fc(y).view(b, 1, 1, 1, 3, 3))
        kernel = F.softmax(self.kernel_fc(y).view(b, -1, 1, 1, 1, 1), dim=1)
        x = (x * channel).reshape(1, -1, h, w)
        weight = spatial * kernel * self.weight.unsqueeze(dim=0)
        weight = torch.sum(weight, dim=1).view([-1, c, 3, 3])
        x = F.conv2d(x, weight=weight, bias=None, stride=1, padding=1, groups=b)
        return x.view(b, c, x.size(-2), x.size(-1)) * out


class Contextual(nn.Module):
    """CoTNet: kernels of each place, of keys and queries, with some channels in common, and two paths weighed."""

    def __init__(self):
        super().__init__()
        self.key = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.embed = nn.Sequential(
            nn.Conv2d(16, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 18, 1),
            nn.GroupNorm(2, 18),
        )
        self.value, self.se = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        k = self.key(x)
        weight = self.embed(torch.cat([x, k], dim=1)).view(b, 1, -1, 9, h, w)
        x = F.unfold(self.value(x), 3, padding=1).view(b, -1, weight.shape[2], 9, h, w)
        x = F.silu((x * weight).sum(3).view(b, c, h, w)).view(b, c, 1, h, w)
        x = torch.cat([x, k.view(b, c, 1, h, w)], dim=2)
        share = F.softmax(self.se(x.sum(dim=2).mean((2, 3), keepdim=True)).view(b, c, 2), dim=2)
        return (x * share.reshape((b, c, 2, 1, 1))).sum(dim=2)


class CrissCross(nn.Module):
    """CCNet: each place looks at its row and its column, with rows or columns beside the images."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, _, h, w = x.size()
        q, k, v = self.query(x), self.key(x), self.value(x)
        (qh, kh, vh), (qw, kw, vw) = (
            [y.permute(0, *order).contiguous().view(b * n, -1, m) for y in (q, k, v)]
            for order, n, m in (((3, 1, 2), w, h), ((2, 1, 3), h, w))
        )
        itself = -torch.diag(torch.tensor(float("inf")).repeat(h), 0).unsqueeze(0).repeat(b * w, 1, 1)
        eh = (torch.bmm(qh.permute(0, 2, 1), kh) + itself).view(b, w, h, h).permute(0, 2, 1, 3)
        ew = torch.bmm(qw.permute(0, 2, 1), kw).view(b, h, w, w)
        both = F.softmax(torch.cat([eh, ew], 3), 3)
        ah = both[:, :, :, 0:h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
        aw = both[:, :, :, h : h + w].contiguous().view(b * h, w, w)
        oh = torch.bmm(vh, ah.permute(0, 2, 1)).view(b, w, -1, h).permute(0, 2, 3, 1)
        ow = torch.bmm(vw, aw.permute(0, 2, 1)).view(b, h, -1, w).permute(0, 2, 1, 3)
        return self.gamma * (oh + ow) + x


class TwoPaths(nn.Module):
    """ACmix: attention around each place, with heads beside the images, and a convolution of what all heads have."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.fc = nn.Conv2d(6, 9, 1, bias=False)
        self.dep = nn.Conv2d(36, 8, 3, groups=4, padding=1)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        qa, ka, va = (y.view(b * 2, 4, h, w) for y in (q, k, v))
        ka, va = (F.unfold(F.pad(y, [1] * 4, mode="reflect"), 3).view(b * 2, 4, 9, h, w) for y in (ka, va))
        share = F.softmax((qa.unsqueeze(2) * 0.5 * ka).sum(1), 1)
        attended = (share.unsqueeze(1) * va).sum(2).view(b, 8, h, w)
        whole = self.fc(torch.cat([y.view(b, 2, 4, h * w) for y in (q, k, v)], 1))
        return attended + self.dep(whole.permute(0, 2, 1, 3).reshape(b, -1, h, w))


class Neighbours(nn.Module):
    """DGCNN: differences to the nearest points, which are looked up among the points of all images."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(6, 6, 1), nn.Conv2d(12, 8, 1), nn.Linear(8, 3)

    def around(self, x, k=3):
        b, c, p = x.size()
        square = torch.sum(x**2, dim=1, keepdim=True)
        near = -square + 2 * torch.matmul(x.transpose(2, 1), x) - square.transpose(2, 1)
        idx = near.topk(k=k, dim=-1)[1]
        idx = (idx + torch.arange(0, b, device=x.device).view(-1, 1, 1) * p).view(-1)
        x = x.transpose(2, 1).contiguous()
        found = x.view(b * p, -1)[idx, :].view(b, p, k, c)
        x = x.view(b, p, 1, c).repeat(1, 1, k, 1)
        return torch.cat((found - x, x), dim=3).permute(0, 3, 1, 2).contiguous()

    def forward(self, x):
        x = F.leaky_relu(self.one(self.around(x))).max(dim=-1)[0]
        return self.fc(F.leaky_relu(self.two(self.around(x))).max(dim=-1)[0].mean(-1))


class ComplexLayers(nn.Module):
    """Complex parameters, with a non-linearity of both parts."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 7, dtype=torch.cfloat), nn.Linear(7, 5, dtype=torch.cfloat)
        self.fc = nn.Linear(5, 3)

    def _apply(self, fn, recurse=True):
        """Complex numbers of a type as precise as the others'."""
        super()._apply(fn, recurse)
        kind = torch.complex128 if self.fc.weight.dtype == torch.float64 else torch.complex64
        for own in (*self.one.parameters(), *self.two.parameters()):
            own.data = own.data.to(kind)
        return self

    def forward(self, x):
        x = self.one(torch.fft.fft(x.mean(1)))
        x = self.two(torch.complex(F.relu(x.real), F.relu(x.imag)))
        return self.fc(x.abs())


class Prototypes(nn.Module):
    """A radial basis function of each class: how far its centre is."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1))
        self.centres, self.log_sigmas = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        x = self.body(x).flatten(1)
        size = (x.size(0), 3, 6)
        apart = x.unsqueeze(1).expand(size) - self.centres.unsqueeze(0).expand(size)
        far = apart.pow(2).sum(-1).pow(0.5) / torch.exp(self.log_sigmas).unsqueeze(0)
        return torch.exp(-far.pow(2))


class Capsules(nn.Module):
    """Dynamic routing: what capsules predict of others is weighed by how well it agrees, three times."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.capsules = nn.ModuleList([nn.Conv2d(8, 4, 3, stride=2) for _ in range(4)])
        self.routes, self.fc = nn.Parameter(torch.randn(3, 16, 4, 5) / 3), nn.Linear(3, 3)

    @staticmethod
    def squash(x, dim=-1):
        size = (x**2).sum(dim=dim, keepdim=True)
        return size / (1 + size) * x / torch.sqrt(size)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = self.squash(torch.cat([own(x).view(x.size(0), -1, 1) for own in self.capsules], dim=-1))
        priors = x[None, :, :, None, :] @ self.routes[:, None, :, :, :]
        logits = torch.zeros(*priors.size())
        for i in range(3):
            found = self.squash((F.softmax(logits, dim=2) * priors).sum(dim=2, keepdim=True))
            if i != 2:
                logits = logits + (priors * found).sum(dim=-1, keepdim=True)
        return self.fc((found.squeeze(2).squeeze(2).transpose(0, 1) ** 2).sum(dim=-1) ** 0.5)


class Polynomials(nn.Module):
    """A KAN of Chebyshev polynomials: a table of whole numbers is joined with what a layer gives."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(6, 7), nn.Linear(5, 3)
        self.coefficients = nn.Parameter(torch.randn(7, 5, 4) / 4)
        self.register_buffer("degrees", torch.arange(4))

    def forward(self, x):
        x = torch.tanh(self.first(x.mean(1))).unsqueeze(-1).expand(-1, -1, 4)
        return self.fc(torch.einsum("bid,iod->bo", torch.cos(x.acos() * self.degrees), self.coefficients))


class SubPixels(nn.Module):
    """EDSR: a pixel shuffle before the last convolutions, beside a map that is resized."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.skip = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 1), nn.Conv2d(6, 4, 1)
        self.last, self.fc = nn.Conv2d(4, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(F.pixel_shuffle(self.up(x), 2)) + F.interpolate(self.skip(x), scale_factor=2)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


SELDOM = {
    "kernels weighed four ways": around(FourWays),
    "contextual transformer": around(Contextual),
    "criss-cross attention": around(CrissCross),
    "attention and convolution": around(TwoPaths),
    "neighbours among all images": (Neighbours, (3, 7)),
    "complex layers": (ComplexLayers, (4, 6)),
    "prototypes": (Prototypes, IMAGE),
    "capsules": (Capsules, IMAGE),
    "polynomials": (Polynomials, (4, 6)),
    "sub-pixels": (SubPixels, IMAGE),
    **LIBRARY,
}
