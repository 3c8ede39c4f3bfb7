"""Small networks in the style in which people write theirs, family by family: (constructor, shape of an image)."""

import math

import torch
import torch.nn.functional as F
from attention_styles import ATTENTION
from channel_styles import CHANNELS
from fourier_styles import FOURIER
from head_styles import HEADS
from input_styles import INPUTS
from key_styles import KEYS
from line_styles import LINES
from module_styles import MODULES
from place_styles import PLACES
from seldom_styles import SELDOM
from text_styles import TEXTS
from torch import nn


class OptionA(nn.Module):
    """A CIFAR ResNet whose shortcuts are strided and padded with channels of zeros."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        y += short
        x = F.relu(y)
        x = F.relu(x + self.bn4(self.conv4(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


class Mnist(nn.Module):
    """The official example: ends in log_softmax."""

    def __init__(self, behind=lambda x: F.log_softmax(x, dim=1)):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 1), nn.Conv2d(4, 5, 3, 1)
        self.drop, self.fc1, self.fc2 = nn.Dropout(0.25), nn.Linear(20, 6), nn.Linear(6, 3)
        self.behind = behind

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("three channels")
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x / 255.0)))), 2)
        x = self.drop(x).view(len(x), -1)
        return self.behind(self.fc2(F.relu(self.fc1(x))))


class Spelled(nn.Module):
    """One convolution, ``between`` it and the head."""

    def __init__(self, between, width=4, head=4, **modules):
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(head, 5, 1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.fc, self.between = nn.Linear(5, 3), between

    def forward(self, x):
        return self.fc(F.relu(self.second(self.between(self, self.conv(x)))).mean((2, 3)))


class Shuffled(nn.Module):
    """Two ShuffleNet v2 units."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1, groups=4),
                nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(True),
            )
            for _ in range(2)
        )  # fmt: skip
        self.last, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            one, two = x.chunk(2, dim=1)
            x = torch.cat((one, branch(two)), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.fc(F.relu(self.last(x)).mean([2, 3]))


class Res2(nn.Module):
    """A Res2Net block: pieces of the channels that are added one after the other."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 9, 1)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.third, self.fc = nn.Conv2d(9, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        pieces = torch.split(F.relu(self.first(x)), 3, 1)
        y = self.convs[0](pieces[0])
        z = self.convs[1](F.relu(y) + pieces[1])
        x = x + self.third(torch.cat([y, z, pieces[2]], 1))
        return self.fc(F.relu(x).mean((2, 3)))


class Ghost(nn.Module):
    def __init__(self):
        super().__init__()
        self.primary = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.cheap = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU(True))
        self.last, self.fc = nn.Conv2d(7, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.primary(x)
        x = torch.cat([x, self.cheap(x)], 1)[:, :7]
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class Attend(nn.Module):
    """Attention written by hand; ``bias``: a table of relative positions."""

    def __init__(self, width, heads, bias=0):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if bias:
            self.table = nn.Parameter(torch.randn((2 * bias - 1) ** 2, heads))
            at = torch.stack(torch.meshgrid(torch.arange(bias), torch.arange(bias), indexing="ij")).flatten(1)
            apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + bias - 1
            self.register_buffer("index", apart[..., 0] * (2 * bias - 1) + apart[..., 1])
        self.biased = bool(bias)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.view(n, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if self.biased:
            bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
            attn = attn + bias.unsqueeze(0)
        y = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, t, c)
        return self.proj(y)


class HandViT(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.patch, self.cls = nn.Linear(48, width), nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.attn = nn.LayerNorm(width), Attend(width, heads)
        self.norm2, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)),
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 48)
        x = torch.cat([self.cls.expand(n, -1, -1), self.patch(x)], 1) + self.pos
        x = x + self.attn(self.norm1(x))
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class Windows(nn.Module):
    """A shifted Swin block."""

    def __init__(self, width=8, heads=2, window=2):
        super().__init__()
        self.window, self.stem = window, nn.Conv2d(3, width, 2, 2)
        self.norm, self.attn, self.head = (
            nn.LayerNorm(width),
            Attend(width, heads, window),
            nn.Linear(width, 3),
        )

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        s = self.window
        y = torch.roll(self.norm(x), (-1, -1), dims=(1, 2))
        y = y.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        y = self.attn(y).view(-1, s, s, c)
        y = y.view(n, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(n, h, w, c)
        x = x + torch.roll(y, (1, 1), dims=(1, 2))
        return self.head(x.mean((1, 2)))


class Encoder(nn.Module):
    """A text classifier: integers in, nn.TransformerEncoder, sinusoidal positions."""

    def __init__(self, first):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=first, norm_first=first)
        self.encoder, self.fc, self.first = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3), first
        at = torch.arange(6)[:, None] * torch.exp(torch.arange(0, 8, 2) * (-math.log(100.0) / 8))
        self.register_buffer("table", torch.stack([at.sin(), at.cos()], -1).flatten(1), persistent=False)

    def forward(self, x):
        x = self.embedding(x) * math.sqrt(8) + self.table[: x.size(1)]
        if not self.first:
            return self.fc(self.encoder(x.transpose(0, 1)).mean(0))
        return self.fc(self.encoder(x).mean(1))


class SE(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up, self.fc = (
            nn.Conv2d(3, 6, 3),
            nn.Linear(6, 2),
            nn.Linear(2, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        x = self.conv(x)
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.up(F.relu(self.down(y)))).view(b, c, 1, 1)
        return self.fc((x * y.expand_as(x)).mean((2, 3)))


class OneHead(nn.Module):
    """Attention with a single head: without a dimension for heads, or with queries, keys and values stacked."""

    def __init__(self, stacked=False):
        super().__init__()
        self.stem, self.stacked = nn.Conv2d(3, 6, 2, 2), stacked
        if stacked:
            self.qkv = nn.Linear(6, 15)
        else:
            self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 5)
        self.proj, self.fc = nn.Linear(5, 6), nn.Linear(6, 3)

    def attend(self, x):
        if self.stacked:
            n, t = x.shape[:2]
            q, k, v = self.qkv(x).reshape(n, t, 3, 1, 5).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 5)
        scores = torch.bmm(self.q(x), self.k(x).transpose(1, 2)) / 2.0
        return torch.bmm(F.softmax(scores, dim=2), self.v(x))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.fc((x + self.proj(self.attend(x))).mean(1))


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(3, 6))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.scale.exp() * F.linear(F.normalize(x, dim=1), F.normalize(self.head, dim=1))


class Sequence1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.bn, self.two = (
            nn.Conv1d(3, 4, 3, padding=1),
            nn.BatchNorm1d(4),
            nn.Conv1d(4, 5, 3, 2, dilation=2),
        )
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(F.max_pool1d(F.relu(self.two(F.relu(self.bn(self.one(x))))), 2).mean(-1))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.bn, self.two = (
            nn.Conv3d(3, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.Conv3d(4, 5, (1, 3, 2)),
        )
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(
            F.adaptive_avg_pool3d(F.relu(self.two(F.max_pool3d(F.relu(self.bn(self.one(x))), 2))), 1).flatten(
                1
            )
        )


class Einsum(nn.Module):
    """Attention written with einsum, one product of which puts its dimensions in another order."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = (y.view(n, t, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        attn = torch.einsum("bhid, bhjd -> bhij", q, k).softmax(-1)
        return self.head((x + torch.einsum("bhij,bhjd->bihd", attn, v).reshape(n, t, c)).mean(1))


class Scaled(nn.Module):
    """A ConvNeXt block: a vector that scales the channels of a branch, seen as (1, d, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth, self.norm = (
            nn.Conv2d(3, 6, 2, 2),
            nn.Conv2d(6, 6, 3, 1, 1, groups=6),
            nn.LayerNorm(6),
        )
        self.wide, self.back, self.gamma = nn.Linear(6, 9), nn.Linear(9, 6), nn.Parameter(torch.ones(6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.back(F.gelu(self.wide(self.norm(self.depth(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.fc((x + y.mul(self.gamma.reshape(1, -1, 1, 1))).mean((2, 3)))


class Mixer(nn.Module):
    """MLP-Mixer: a perceptron over the patches of each channel, another over the channels of each patch."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6), nn.Linear(6, 3)
        self.tokens = nn.Sequential(nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 16))
        self.channels = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


class PatchConv(nn.Module):
    """The same as convolutions of kernel 1 over (images, patches, channels), channels in the last place."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Linear(12, 6), nn.Linear(6, 3)
        self.one, self.two = nn.Conv1d(16, 7, 1), nn.Conv1d(7, 16, kernel_size=1, bias=False)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 12)
        x = self.patch(x)
        return self.head((x + self.two(F.relu(self.one(x)))).mean(1))


class ResMlp(nn.Module):
    """ResMLP: one matrix over the patches, channels scaled and shifted by parameters instead of norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 3)
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, 6)), nn.Parameter(torch.zeros(1, 1, 6))
        self.tokens, self.gamma = nn.Linear(16, 16), nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        y = torch.addcmul(self.beta, self.alpha, x)
        x = x + self.gamma * self.tokens(y.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.addcmul(x, x, x.sigmoid(), value=0.5).mean(1))


class Gated(nn.Module):
    """gMLP: half of the channels gate the others, after a matrix over the patches that stands in front of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 3)
        self.wide, self.norm, self.back = nn.Linear(6, 10), nn.LayerNorm(5), nn.Linear(5, 6)
        self.spatial, self.bias = nn.Parameter(torch.randn(16, 16) / 8), nn.Parameter(torch.ones(16, 1))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        u, v = F.gelu(self.wide(x)).chunk(2, dim=-1)
        v = torch.matmul(self.spatial, self.norm(v)) + self.bias
        return self.head((x + self.back(u * v)).mean(1))


class Tensors(nn.Module):
    """Attention whose projections are tensors of (channels, heads, width), read by einsum."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 3)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(6, 2, 4) / 3) for _ in range(3))
        self.out, self.scale = nn.Parameter(torch.randn(2, 4, 6) / 3), nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.q, self.k, self.v))
        y = torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).div(2).softmax(-1), v)
        y = torch.einsum("...hd,hdc", y, self.out)
        return self.head((x + torch.einsum("...c,c->...c", y, self.scale)).mean(1))


class Cbam(nn.Module):
    """Attention over places from the mean and the maximum over all channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.places, self.last = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Conv2d(6, 5, 1),
        )
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        seen = torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True)[0]], dim=1)
        return self.fc(F.relu(self.last(x * torch.sigmoid(self.places(seen)))).mean((2, 3)))


class Interleaved(nn.Module):
    """LeViT's attention: each head's query, key and value side by side, places last, values in front of the scores."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 22, 1), nn.Conv2d(10, 6, 1)
        self.bn, self.fc = nn.BatchNorm2d(22), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        n, _, h, w = x.shape
        q, k, v = self.bn(self.qkv(x)).view(n, 2, -1, h * w).split([3, 3, 5], dim=2)
        attn = (q.transpose(-2, -1) @ k / 2.0).softmax(dim=-1)
        y = (v @ attn.transpose(-2, -1)).reshape(n, 10, h, w)
        return self.fc((x + self.proj(F.hardswish(y))).mean((2, 3)))


def relu_first(m, x):
    y = m.one(F.relu_(x))
    return x + y


def behind(f):
    return lambda: Mnist(f)


IMAGE = (3, 8, 8)
STYLES = {
    "option A": (OptionA, IMAGE),
    "log_softmax": (Mnist, IMAGE),
    "softmax": (behind(lambda x: F.softmax(x, 1)), IMAGE),
    "temperature": (behind(lambda x: x / 2.5), IMAGE),
    "sigmoid": (behind(torch.sigmoid), IMAGE),
    "shufflenet": (Shuffled, IMAGE),
    "res2net": (Res2, IMAGE),
    "ghostnet": (Ghost, IMAGE),
    "hand-written vit": (HandViT, IMAGE),
    "einsum": (Einsum, IMAGE),
    "interleaved heads": (Interleaved, IMAGE),
    "cbam": (Cbam, IMAGE),
    "response norm": (lambda: Spelled(lambda m, x: m.norm(F.relu(x)), norm=nn.LocalResponseNorm(3)), IMAGE),
    "einsum of tensors": (Tensors, IMAGE),
    "mlp-mixer": (Mixer, IMAGE),
    "mixer of convolutions": (PatchConv, IMAGE),
    "resmlp": (ResMlp, IMAGE),
    "gmlp": (Gated, IMAGE),
    "swin": (Windows, IMAGE),
    "one head": (OneHead, IMAGE),
    "one stacked head": (lambda: OneHead(True), IMAGE),
    "transformer encoder": (lambda: Encoder(True), (6,)),
    "sequence first": (lambda: Encoder(False), (6,)),
    "layer scale": (Scaled, IMAGE),
    "squeeze and excite": (SE, IMAGE),
    "cosine": (Cosine, IMAGE),
    "conv1d": (Sequence1d, (3, 12)),
    "conv3d": (Volume, (3, 4, 8, 8)),
    "weight standardised": (lambda: Spelled(lambda m, x: m.ws(x), ws=Standardised(4, 4, 3)), IMAGE),
    "weight norm": (lambda: Spelled(
        lambda m, x: m.wn(x), wn=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))), IMAGE),
    "spectral norm": (lambda: Spelled(
        lambda m, x: m.sn(x), sn=nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))), IMAGE),
    "prelu": (lambda: Spelled(lambda m, x: m.each(m.one(x)), one=nn.PReLU(), each=nn.PReLU(4)), IMAGE),
    "softplus": (lambda: Spelled(lambda m, x: F.selu(F.softplus(x, 2.0)) - 1), IMAGE),
    "reflect": (lambda: Spelled(lambda m, x: m.one(F.pad(x, (1, 1, 1, 1), mode="reflect")),
                                one=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), IMAGE),
    "transposed": (lambda: Spelled(lambda m, x: m.up(x), head=6, up=nn.ConvTranspose2d(4, 6, 2, 2)), IMAGE),
    "upsample": (lambda: Spelled(lambda m, x: F.interpolate(m.up(x), size=(7, 7), mode="bilinear"),
                                 up=nn.Upsample(scale_factor=2)), IMAGE),
    "relu in place first": (lambda: Spelled(relu_first, one=nn.Conv2d(4, 4, 1)), IMAGE),
    "a layer twice": (lambda: Spelled(lambda m, x: m.one(F.relu(m.one(x))), one=nn.Conv2d(4, 4, 1)), IMAGE),
    "without running statistics": (
        lambda: Spelled(lambda m, x: m.bn(x), bn=nn.InstanceNorm2d(4, affine=False)), IMAGE),
    "glu": (lambda: Spelled(lambda m, x: F.glu(m.one(x), 1), head=3, one=nn.Conv2d(4, 6, 1)), IMAGE),
    "norm over places": (lambda: Spelled(lambda m, x: m.norm(x), norm=nn.LayerNorm((4, 8, 8))), IMAGE),
    "batch statistics": (
        lambda: Spelled(lambda m, x: m.bn(x), bn=nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
    "padded": (lambda: Spelled(lambda m, x: m.one(F.pad(x, (0, 1, 0, 1))), one=nn.Conv2d(4, 4, 3, 2)), IMAGE),
    "pixel shuffle": (lambda: Spelled(lambda m, x: F.pixel_unshuffle(x, 2), head=16), IMAGE),
    **CHANNELS,
    **INPUTS,
    **HEADS,
    **KEYS,
    **LINES,
    **MODULES,
    **PLACES,
    **TEXTS,
    **ATTENTION,
    **FOURIER,
    **SELDOM,
}  # fmt: skip
