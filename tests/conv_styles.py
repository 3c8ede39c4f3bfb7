"""Small convolutional networks in the style of each research family: (constructor, shape of an image)."""

import math

import torch
import torch.nn.functional as F
from styles import IMAGE, Mnist, Spelled
from torch import nn


def conv(c_in, c_out, kernel=3, stride=1, groups=1, act=True):
    layers = [
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(True)] if act else []))


class Headed(nn.Module):
    """A stem, the body of a family, and a linear head."""

    def __init__(self, body, width, stem=8):
        super().__init__()
        self.stem, self.body, self.fc = conv(3, stem), body, nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.body(self.stem(x)), (1, 1)), 1))


class ShuffleUnit(nn.Module):
    """ShuffleNet v1: grouped 1x1, channel shuffle, depthwise, grouped 1x1; strided units concatenate."""

    def __init__(self, c_in, c_out, stride, groups=2):
        super().__init__()
        self.groups, self.stride = groups, stride
        grown, mid = c_out - c_in if stride == 2 else c_out, c_out // 2
        self.gconv1, self.dw = conv(c_in, mid, 1, groups=groups), conv(mid, mid, 3, stride, mid, act=False)
        self.gconv2 = conv(mid, grown, 1, groups=groups, act=False)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x):
        y = self.gconv1(x)
        n, c, h, w = y.data.size()
        y = y.view(n, self.groups, c // self.groups, h, w)
        y = torch.transpose(y, 1, 2).contiguous().view(n, -1, h, w)
        y = self.gconv2(self.dw(y))
        return F.relu(torch.cat([y, self.pool(x)], 1) if self.stride == 2 else y + x)


class DenseLayer(nn.Module):
    """DenseNet for CIFAR: pre-activation, bottleneck, the input beside the output."""

    def __init__(self, c_in, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(2 * growth),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((y, x), 1)


class DualPath(nn.Module):
    """DPN: the first channels are added, the rest are put beside."""

    def __init__(self, c_in, mid, out, dense, first):
        super().__init__()
        self.out, self.one, self.two = out, conv(c_in, mid, 1), conv(mid, mid, 3, groups=2)
        self.three = conv(mid, out + dense, 1, act=False)
        self.short = conv(c_in, out + dense, 1, act=False) if first else nn.Sequential()

    def forward(self, x):
        y, x, d = self.three(self.two(self.one(x))), self.short(x), self.out
        return F.relu(torch.cat([x[:, :d] + y[:, :d], x[:, d:], y[:, d:]], 1))


class Exchange(nn.Module):
    """HRNet: two resolutions that are added to each other."""

    def __init__(self):
        super().__init__()
        self.down, self.high, self.low = conv(8, 6, 3, 2), conv(8, 8), conv(6, 6)
        self.lower, self.higher = conv(8, 6, 3, 2, act=False), conv(6, 8, 1, act=False)

    def forward(self, x):
        high, low = self.high(x), self.low(self.down(x))
        up = F.interpolate(self.higher(low), size=high.shape[-2:], mode="nearest")
        high, low = F.relu(high + up), F.relu(low + self.lower(high))
        return torch.cat([high, F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)], 1)


class SamePadding(nn.Conv2d):
    """As EfficientNet pads: by the size of the image, unevenly."""

    def forward(self, x):
        (h, w), (kh, kw), (sh, sw) = x.size()[-2:], self.weight.size()[-2:], self.stride
        ph = max((math.ceil(h / sh) - 1) * sh + (kh - 1) * self.dilation[0] + 1 - h, 0)
        pw = max((math.ceil(w / sw) - 1) * sw + (kw - 1) * self.dilation[1] + 1 - w, 0)
        if ph > 0 or pw > 0:
            x = F.pad(x, [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class MBConv(nn.Module):
    """An EfficientNet block: expand, same-padded depthwise, squeeze and excite, project, drop connect."""

    def __init__(self, width=8, wide=16):
        super().__init__()
        self.expand, self.bn0 = (
            SamePadding(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide, momentum=0.01, eps=1e-3),
        )
        self.dw, self.bn1 = SamePadding(wide, wide, 3, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.reduce, self.excite = SamePadding(wide, 2, 1), SamePadding(2, wide, 1)
        self.project, self.bn2, self.swish = (
            SamePadding(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
            Swish(),
        )
        self.strided = SamePadding(width, width, 3, stride=2)

    def forward(self, x):
        y = self.swish(self.bn1(self.dw(self.swish(self.bn0(self.expand(x))))))
        gate = self.excite(self.swish(self.reduce(F.adaptive_avg_pool2d(y, 1))))
        y = self.bn2(self.project(torch.sigmoid(gate) * y))
        if self.training:
            y = y / 0.8 * torch.floor(0.8 + torch.rand([len(y), 1, 1, 1]))
        return self.strided(x + y)


class RepBlock(nn.Module):
    """RepVGG and MobileOne: branches of 3x3, 1x1 and a norm alone, here depthwise and then pointwise."""

    def __init__(self, width=8, depthwise=False):
        super().__init__()
        groups = width if depthwise else 1
        self.three, self.one = (conv(width, width, k, groups=groups, act=False) for k in (3, 1))
        self.skip, self.act = nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x):
        out = 0
        for branch in (self.three, self.one, self.skip):
            out += branch(x)
        return self.act(out)


class ScaledConv(nn.Conv2d):
    """NFNet: weights standardised by a batch norm, with a gain."""

    def __init__(self, c_in, c_out, kernel=3, **settings):
        super().__init__(c_in, c_out, kernel, **settings)
        self.gain = nn.Parameter(torch.ones(c_out, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x):
        gain = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, weight=gain, training=True, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormFree(nn.Module):
    """NFNet block: no norms; beta on the way in, alpha and a gain on the way out."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (
            ScaledConv(8, 6, 1),
            ScaledConv(6, 6, padding=1, groups=2),
            ScaledConv(6, 8, 1),
        )
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        y = F.gelu(x) * 1.7015 * 0.9
        y = self.three(F.gelu(self.two(F.gelu(self.one(y)) * 1.7015)) * 1.7015)
        return x + y.mul_(self.skip_gain) * 0.2


class StandardConv(nn.Conv2d):
    """BiT: weight standardisation."""

    def forward(self, x):
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(
            x,
            (self.weight - m) / torch.sqrt(v + 1e-10),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class PreActivation(nn.Module):
    """BiT ResNetV2: group norm before weight-standardised convolutions."""

    def __init__(self):
        super().__init__()
        self.gn1, self.conv1 = nn.GroupNorm(2, 8), StandardConv(8, 4, 1, bias=False)
        self.gn2, self.conv2 = nn.GroupNorm(2, 4), StandardConv(4, 12, 3, 2, 1, bias=False)
        self.down, self.gn3, self.relu = (
            StandardConv(8, 12, 1, 2, bias=False),
            nn.GroupNorm(3, 12),
            nn.ReLU(True),
        )

    def forward(self, x):
        y = self.relu(self.gn1(x))
        residual = self.down(y)
        y = self.conv2(self.relu(self.gn2(self.conv1(y))))
        return self.relu(self.gn3(y + residual))


class Mixed(nn.Module):
    """Inception v3: branches of factorised convolutions and a pool, side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.five1, self.five2 = conv(8, 4, 1), conv(8, 3, 1), conv(3, 5, 5)
        self.wide = nn.Conv2d(8, 6, (1, 7), padding=(0, 3))
        self.tall, self.both = (
            nn.Conv2d(6, 4, (7, 1), padding=(3, 0)),
            nn.Conv2d(6, 3, (1, 3), padding=(0, 1)),
        )
        self.pooled = conv(8, 4, 1)

    def forward(self, x):
        wide = self.wide(x)
        double = torch.cat([self.tall(wide), self.both(wide)], 1)
        pooled = self.pooled(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat(
            [self.one(x), self.five2(self.five1(x)), double, pooled, F.max_pool2d(x, 3, 1, 1)], 1
        )


class Separable(nn.Module):
    """Xception: activation first, depthwise and pointwise, a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(False), nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.Conv2d(8, 12, 1, bias=False),
            nn.BatchNorm2d(12), nn.ReLU(True), nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False),
            nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.skip, self.skipbn = nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)

    def forward(self, x):
        y = self.body(x)
        y += self.skipbn(self.skip(x))
        return y


class Cell(nn.Module):
    """NASNet and PNASNet: sums of pairs side by side, and a reduction by two shifted grids."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.shift = conv(8, 4, 1), conv(8, 4, 3), nn.ZeroPad2d((-1, 1, -1, 1))
        self.path1, self.path2 = nn.Conv2d(8, 3, 1, bias=False), nn.Conv2d(8, 3, 1, bias=False)
        self.bn, self.last = nn.BatchNorm2d(6), conv(6, 6)

    def forward(self, x):
        pairs = [self.left(x) + F.avg_pool2d(self.right(x), 3, 1, 1, count_include_pad=False)]
        pairs.append(F.max_pool2d(self.left(x), 3, 1, 1) + pairs[0])
        y = F.relu(torch.cat(pairs, 1))
        one = self.path1(F.avg_pool2d(y, 1, 2, count_include_pad=False))
        two = self.path2(F.avg_pool2d(self.shift(y), 1, 2, count_include_pad=False))
        return self.last(self.bn(torch.cat([one, two], 1)))


class Fire(nn.Module):
    """SqueezeNet: its head is a convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)
        self.one, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(9, 3, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x):
        x = F.relu(self.squeeze(F.relu(self.stem(x))))
        x = F.relu(torch.cat([self.one(x), self.three(x)], 1))
        return torch.flatten(self.classifier(x), 1)


class Wide(nn.Module):
    """Wide ResNet: pre-activation, dropout between, the activation shared with the shortcut."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)

    def forward(self, x):
        x = F.relu(self.bn1(x), inplace=True)
        y = F.dropout(F.relu(self.bn2(self.conv1(x)), inplace=True), p=0.3, training=self.training)
        return torch.add(self.shortcut(x), self.conv2(y))


class Context(nn.Module):
    """GCNet: one map of attention for all channels."""

    def __init__(self):
        super().__init__()
        self.mask, self.down, self.norm, self.up = (
            nn.Conv2d(8, 1, 1),
            nn.Conv2d(8, 3, 1),
            nn.LayerNorm((3, 1, 1)),
            nn.Conv2d(3, 8, 1),
        )

    def forward(self, x):
        n, c, h, w = x.shape
        at = self.mask(x).reshape(n, 1, h * w).softmax(-1).unsqueeze(3)
        y = torch.matmul(x.reshape(n, c, h * w).unsqueeze(1), at).view(n, c, 1, 1)
        return x + self.up(F.relu(self.norm(self.down(y))))


class Kernels(nn.Module):
    """SKNet and ResNeSt: branches weighted by a softmax over them."""

    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList([conv(8, 8, 3, groups=2), conv(8, 8, 5, groups=2)])
        self.down, self.up = conv(8, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        y = torch.stack([path(x) for path in self.paths], dim=1)
        n, k, c, _, _ = y.shape
        weights = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True))).view(n, k, c, 1, 1)
        return torch.sum(y * torch.softmax(weights, dim=1), dim=1)


class Bands(nn.Module):
    """InceptionNeXt: some channels pass, others meet a square kernel or a band."""

    def __init__(self):
        super().__init__()
        self.square = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(2, 2, (1, 5), padding=(0, 2), groups=2)
        self.sizes, self.norm, self.mlp = (4, 2, 2), nn.BatchNorm2d(8), conv(8, 8, 1)

    def forward(self, x):
        same, square, wide = torch.split(x, self.sizes, dim=1)
        y = torch.cat((same, self.square(square), self.wide(wide)), dim=1)
        return self.mlp(self.norm(y)) + x


class Decoder(nn.Module):
    """U-Net and DCGAN: down, and up again by transposed convolutions, what was there before beside it."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(8, 6, 3, 2), conv(6, 7, 3, 2)
        self.up = nn.ConvTranspose2d(7, 5, 3, 2, padding=1, output_padding=1, bias=False)
        self.norm, self.each = nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 5, 4, 2, 1, groups=5)
        self.last = conv(13, 6)

    def forward(self, x):
        y = F.leaky_relu(self.norm(self.up(self.deep(self.down(x)))), 0.2)
        return self.last(torch.cat([x, self.each(y)], 1))


class Beside(nn.Module):
    """A grouped convolution whose groups read different branches."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.grouped = conv(8, 4), conv(8, 4, 1), nn.Conv2d(8, 6, 1, groups=2)

    def forward(self, x):
        return self.grouped(torch.cat([self.one(x), self.two(x)], 1))


def behind(module, classes=3):
    """The official MNIST example with something behind its head."""
    network = Mnist(lambda x: x)
    network.fc2, network.behind = nn.Linear(6, classes), module
    return network


STYLES = {
    "shufflenet v1": (lambda: Headed(nn.Sequential(ShuffleUnit(8, 8, 1), ShuffleUnit(8, 16, 2)), 16), IMAGE),
    "densenet": (lambda: Headed(nn.Sequential(DenseLayer(8, 3), DenseLayer(11, 3), nn.AvgPool2d(2)), 14), IMAGE),
    "dpn": (lambda: Headed(nn.Sequential(DualPath(8, 4, 6, 2, True), DualPath(10, 4, 6, 2, False)), 12), IMAGE),
    "hrnet": (lambda: Headed(Exchange(), 14), IMAGE),
    "efficientnet, same padding": (lambda: Headed(MBConv(), 8), IMAGE),
    "regnet": (lambda: Headed(nn.Sequential(conv(8, 8, 3, 2, 4), conv(8, 8, 1)), 8), IMAGE),
    "repvgg": (lambda: Headed(nn.Sequential(RepBlock(), conv(8, 6, 3, 2), RepBlock(6)), 6), IMAGE),
    "mobileone": (lambda: Headed(nn.Sequential(RepBlock(8, True), conv(8, 6, 1), RepBlock(6, True)), 6), IMAGE),
    "nfnet": (lambda: Headed(NormFree(), 8), IMAGE),
    "bit": (lambda: Headed(PreActivation(), 12), IMAGE),
    "inception": (lambda: Headed(Mixed(), 28), IMAGE),
    "xception": (lambda: Headed(Separable(), 12), IMAGE),
    "nasnet": (lambda: Headed(Cell(), 6), IMAGE),
    "squeezenet": (Fire, IMAGE),
    "wide resnet": (lambda: Headed(Wide(), 16), IMAGE),
    "selective kernels": (lambda: Headed(Kernels(), 8), IMAGE),
    "inception-next": (lambda: Headed(Bands(), 8), IMAGE),
    "decoder": (lambda: Headed(Decoder(), 6), IMAGE),
    "groups of other branches": (lambda: Headed(Beside(), 6), IMAGE),
    "batch norm behind the head": (lambda: behind(nn.BatchNorm1d(3)), IMAGE),
    "one logit": (lambda: behind(nn.Identity(), 1), IMAGE),
    "one probability": (lambda: behind(nn.Sigmoid(), 1), IMAGE),
    "local response norm": (lambda: Spelled(
        lambda m, x: m.two(m.norm(F.relu(x))), norm=nn.LocalResponseNorm(3), two=nn.Conv2d(4, 4, 1)), IMAGE),
    "instance norm": (lambda: Spelled(lambda m, x: m.norm(x), norm=nn.InstanceNorm2d(4, affine=True)), IMAGE),
}  # fmt: skip
REFUSED = {
    "global context": (lambda: Headed(Context(), 8), IMAGE),
}
