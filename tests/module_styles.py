"""Attention modules of convolutional networks, and convolutions whose kernels depend on the image, as their authors
write them: (constructor, shape of an image)."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE = (3, 8, 8)


class Around(nn.Module):
    """A stem of 8 channels, a module of the same, a layer that reads it, a head."""

    def __init__(self, body):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.body, self.last, self.fc = body, nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(F.relu(self.last(self.body(self.stem(x)))).mean((2, 3)))


class SplitAttention(nn.Module):
    """ResNeSt: a convolution of radix * cardinality groups whose radix parts are added up by a softmax over them."""

    def __init__(self, cardinality=1, radix=2):
        super().__init__()
        self.cardinality, self.radix = cardinality, radix
        self.conv = nn.Conv2d(8, 8 * radix, 3, 1, 1, groups=cardinality * radix, bias=False)
        self.bn0, self.fc1 = nn.BatchNorm2d(8 * radix), nn.Conv2d(8, 6, 1, groups=cardinality)
        self.bn1, self.fc2 = nn.BatchNorm2d(6), nn.Conv2d(6, 8 * radix, 1, groups=cardinality)

    def weights(self, gap):
        x = self.fc2(F.relu(self.bn1(self.fc1(F.adaptive_avg_pool2d(gap, 1)))))
        n = x.size(0)
        x = F.softmax(x.view(n, self.cardinality, self.radix, -1).transpose(1, 2), dim=1)
        return x.reshape(n, -1).view(n, -1, 1, 1)

    def forward(self, x):
        x = F.relu(self.bn0(self.conv(x)))
        splits = torch.split(x, x.shape[1] // self.radix, dim=1)
        attens = torch.split(self.weights(sum(splits)), x.shape[1] // self.radix, dim=1)
        return sum(att * split for att, split in zip(attens, splits, strict=True)).contiguous()


class SplitAttentionView(SplitAttention):
    """The same as timm has it: the parts on a dimension of their own."""

    def forward(self, x):
        x = F.relu(self.bn0(self.conv(x)))
        n, c, h, w = x.shape
        x = x.reshape((n, self.radix, c // self.radix, h, w))
        weights = self.weights(x.sum(dim=1))
        return (x * weights.reshape((n, self.radix, c // self.radix, 1, 1))).sum(dim=1)


class PooledGate(nn.Module):
    """Of triplet attention, for each of three views: the largest and the mean of a dimension, one map, its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)

    def forward(self, x):
        seen = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid_(self.bn(self.conv(seen)))


class Triplet(nn.Module):
    def __init__(self):
        super().__init__()
        self.cw, self.hc, self.hw = PooledGate(), PooledGate(), PooledGate()

    def forward(self, x):
        one = self.cw(x.permute(0, 2, 1, 3).contiguous()).permute(0, 2, 1, 3).contiguous()
        two = self.hc(x.permute(0, 3, 2, 1).contiguous()).permute(0, 3, 2, 1).contiguous()
        return 1 / 3 * (self.hw(x) + one + two)


class Coordinates(nn.Module):
    """Coordinate attention."""

    def __init__(self):
        super().__init__()
        self.pools = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv1, self.bn1 = nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
        self.conv_h, self.conv_w = nn.Conv2d(5, 8, 1), nn.Conv2d(5, 8, 1)

    def forward(self, x):
        _, _, h, w = x.size()
        y = torch.cat([self.pools[0](x), self.pools[1](x).permute(0, 1, 3, 2)], dim=2)
        y = self.bn1(self.conv1(y))
        x_h, x_w = torch.split(y * (F.relu6(y + 3) / 6), [h, w], dim=2)
        return x * self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(x_h).sigmoid()


class DualAttention(nn.Module):
    """DANet: between places, and between channels by how far scores are below their row's largest."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.gamma, self.delta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def places(self, x):
        n, c, h, w = x.size()
        q, k = self.q(x).view(n, -1, h * w).permute(0, 2, 1), self.k(x).view(n, -1, h * w)
        attention = torch.softmax(torch.bmm(q, k), dim=-1)
        y = torch.bmm(self.v(x).view(n, -1, h * w), attention.permute(0, 2, 1))
        return self.gamma * y.view(n, c, h, w) + x

    def channels(self, x):
        n, c, h, w = x.size()
        energy = torch.bmm(x.view(n, c, -1), x.view(n, c, -1).permute(0, 2, 1))
        energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        y = torch.bmm(torch.softmax(energy, dim=-1), x.view(n, c, -1))
        return self.delta * y.view(n, c, h, w) + x

    def forward(self, x):
        return self.one(self.places(x)) + self.two(self.channels(x))


class Involution(nn.Module):
    """A kernel for each place and group of channels, which a layer makes (RedNet)."""

    def __init__(self, wide=4, stride=1):
        super().__init__()
        self.groups, self.wide = 8 // wide, wide
        self.one = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.two, self.unfold = nn.Conv2d(4, 9 * self.groups, 1), nn.Unfold(3, 1, 1, stride)
        self.pool = nn.AvgPool2d(stride, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        weight = self.two(self.one(self.pool(x)))
        n, _, h, w = weight.shape
        weight = weight.view(n, self.groups, 9, h, w).unsqueeze(2)
        out = self.unfold(x).view(n, self.groups, self.wide, 9, h, w)
        return (weight * out).sum(dim=3).view(n, 8, h, w)


class Reassembled(nn.Module):
    """CARAFE: a kernel for each place of a larger map, the same for all channels."""

    def __init__(self):
        super().__init__()
        self.compress, self.encode = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 36, 3, padding=1)

    def forward(self, x):
        n, c, h, w = x.shape
        kernels = F.softmax(F.pixel_shuffle(self.encode(self.compress(x)), 2), dim=1)
        near = F.interpolate(F.unfold(x, 3, padding=1).view(n, c * 9, h, w), scale_factor=2)
        return (near.view(n, c, 9, 2 * h, 2 * w) * kernels.unsqueeze(1)).sum(2)


class Dynamic(nn.Module):
    """Dynamic convolution: kernels mixed for each image, all images in one grouped convolution."""

    def __init__(self, groups=1):
        super().__init__()
        self.groups, self.fc1, self.fc2 = groups, nn.Conv2d(8, 5, 1, bias=False), nn.Conv2d(5, 4, 1)
        self.weight = nn.Parameter(0.2 * torch.randn(4, 8, 8 // groups, 3, 3))
        self.bias = nn.Parameter(torch.zeros(4, 8))

    def gates(self, x):
        x = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).view(x.size(0), -1)
        return F.softmax(x / 34, 1)

    def forward(self, x):
        gates, (n, c, h, w) = self.gates(x), x.size()
        weight = torch.mm(gates, self.weight.view(4, -1)).view(-1, c // self.groups, 3, 3)
        bias = torch.mm(gates, self.bias).view(-1)
        x = F.pad(x.view(1, -1, h, w), (0, 1, 1, 1))
        y = F.conv2d(x, weight, bias, (1, 2), 0, 1, groups=self.groups * n)
        return y.view(n, 8, y.size(-2), y.size(-1))


class DynamicSum(Dynamic):
    """The same without a bias, the kernels multiplied and added up, or by einsum."""

    def __init__(self, letters=False):
        super().__init__()
        self.letters = letters

    def forward(self, x):
        gates, (n, c, h, w) = self.gates(x), x.size()
        if self.letters:
            weight = torch.einsum("nk,koihw->noihw", gates, self.weight)
        else:
            weight = (gates.view(n, 4, 1, 1, 1, 1) * self.weight.unsqueeze(0)).sum(1)
        y = F.conv2d(x.reshape(1, n * c, h, w), weight.reshape(-1, c, 3, 3), padding=1, groups=n)
        return y.permute(1, 0, 2, 3).view(n, 8, h, w)


class ShuffledGroups(nn.Module):
    """SA-Net: groups beside the images, one half of each gated by its means, the other by its norm."""

    def __init__(self):
        super().__init__()
        self.gn = nn.GroupNorm(2, 2)
        self.cw, self.cb, self.sw, self.sb = (nn.Parameter(torch.zeros(1, 2, 1, 1)) for _ in range(4))

    def forward(self, x):
        n, c, h, w = x.size()
        one, two = x.view(n * 2, -1, h, w).chunk(2, dim=1)
        one = one * torch.sigmoid(self.cw * F.adaptive_avg_pool2d(one, 1) + self.cb)
        two = two * torch.sigmoid(self.sw * self.gn(two) + self.sb)
        x = torch.cat([one, two], dim=1).contiguous().view(n, -1, h, w)
        return x.reshape(n, 2, -1, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class SpatialGroups(nn.Module):
    """SGE: each group's likeness to its mean at every place, of unit variance."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, 2, 1, 1)), nn.Parameter(torch.ones(1, 2, 1, 1))

    def forward(self, x):
        n, c, h, w = x.size()
        x = x.view(n * 2, -1, h, w)
        t = (x * F.adaptive_avg_pool2d(x, 1)).sum(dim=1, keepdim=True).view(n * 2, -1)
        t = t - t.mean(dim=1, keepdim=True)
        t = (t / (t.std(dim=1, keepdim=True) + 1e-5)).view(n, 2, h, w) * self.weight + self.bias
        return (x * torch.sigmoid(t.view(n * 2, 1, h, w))).view(n, c, h, w)


class MultiScaleGroups(nn.Module):
    """EMA: small layers of all groups, and products of what two of them give."""

    def __init__(self):
        super().__init__()
        self.gn, self.one, self.three = nn.GroupNorm(4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        n, c, h, w = x.size()
        g = x.reshape(n * 2, -1, h, w)
        seen = torch.cat([g.mean(3, keepdim=True), g.mean(2, keepdim=True).permute(0, 1, 3, 2)], dim=2)
        x_h, x_w = torch.split(self.one(seen), [h, w], dim=2)
        x1, x2 = self.gn(g * x_h.sigmoid() * x_w.permute(0, 1, 3, 2).sigmoid()), self.three(g)
        weights = 0
        for a, b in ((x1, x2), (x2, x1)):
            a = torch.softmax(F.adaptive_avg_pool2d(a, 1).reshape(n * 2, -1, 1).permute(0, 2, 1), -1)
            weights = weights + torch.matmul(a, b.reshape(n * 2, 4, -1))
        return (g * weights.reshape(n * 2, 1, h, w).sigmoid()).reshape(n, c, h, w)


class Polarised(nn.Module):
    """Polarised self-attention: one score of each place weighs channels, one of each channel weighs places."""

    def __init__(self):
        super().__init__()
        self.wv, self.wq, self.wz = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(4, 8, 1)
        self.ln, self.sv, self.sq = nn.LayerNorm(8), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        n, c, h, w = x.size()
        wq = torch.softmax(self.wq(x).reshape(n, -1, 1), 1)
        wz = self.wz(torch.matmul(self.wv(x).reshape(n, c // 2, -1), wq).unsqueeze(-1))
        x = self.ln(wz.reshape(n, c, 1).permute(0, 2, 1)).sigmoid().permute(0, 2, 1).reshape(n, c, 1, 1) * x
        sq = F.adaptive_avg_pool2d(self.sq(x), (1, 1)).permute(0, 2, 3, 1).reshape(n, 1, c // 2)
        sz = torch.matmul(torch.softmax(sq, -1), self.sv(x).reshape(n, c // 2, -1))
        return sz.reshape(n, 1, h, w).sigmoid() * x


class LargeSelective(nn.Module):
    """LSKNet: two maps side by side are weighed by what their mean and largest channel say."""

    def __init__(self):
        super().__init__()
        self.near, self.far = (nn.Conv2d(8, 8, k, padding=k // 2, groups=8) for k in (3, 5))
        self.one, self.two, self.squeeze = (
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(2, 2, 3, padding=1),
        )
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        near = self.near(x)
        one, two = self.one(near), self.two(self.far(near))
        both = torch.cat([one, two], dim=1)
        seen = torch.cat(
            [torch.mean(both, dim=1, keepdim=True), torch.max(both, dim=1, keepdim=True)[0]], dim=1
        )
        sig = self.squeeze(seen).sigmoid()
        y = one * sig[:, 0, :, :].unsqueeze(1) + two * sig[:, 1, :, :].unsqueeze(1)
        return x * self.conv(y)


class NormWeights(nn.Module):
    """NAM: a gate by the weights of a batch norm, over their sum."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        share = self.bn.weight.data.abs() / torch.sum(self.bn.weight.data.abs())
        y = torch.mul(share, self.bn(x).permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        return torch.sigmoid(y) * x


class Masked(nn.Module):
    """A sum over places by one mask, which is a line of places for its softmax."""

    def __init__(self):
        super().__init__()
        self.mask, self.out = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        mask = torch.softmax(self.mask(x).view(n, -1), 1).view(n, 1, h, w)
        return x + self.out((x * mask).sum((2, 3), keepdim=True))


def around(make):
    return lambda: Around(make()), IMAGE


MODULES = {
    "split attention": around(SplitAttention),
    "split attention, a dimension of parts": around(SplitAttentionView),
    "split attention of two groups": around(lambda: SplitAttention(2)),
    "split attention of two groups, a dimension of parts": around(lambda: SplitAttentionView(2)),
    "triplet attention": around(Triplet),
    "coordinate attention": around(Coordinates),
    "dual attention": around(DualAttention),
    "involution": around(Involution),
    "involution of one group": around(lambda: Involution(8, 2)),
    "kernels of a larger map": around(Reassembled),
    "dynamic convolution": around(Dynamic),
    "dynamic depthwise convolution": around(lambda: Dynamic(8)),
    "dynamic convolution by a sum": around(DynamicSum),
    "dynamic convolution by einsum": around(lambda: DynamicSum(True)),
    "groups beside images": around(ShuffledGroups),
    "spatial groups": around(SpatialGroups),
    "multi-scale groups": around(MultiScaleGroups),
    "polarised attention": around(Polarised),
    "large selective kernels": around(LargeSelective),
    "gate of norm weights": around(NormWeights),
    "mask as a line": around(Masked),
}
