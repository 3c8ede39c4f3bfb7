"""Narrow networks of the classes that people use, family by family."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenetv2, resnet, vgg, vision_transformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt


def narrow_vgg(batch_norm):
    layers = vgg.make_layers([4, "M", 6, "M", 5, 5, "M"], batch_norm=batch_norm)
    network = vgg.VGG(layers, num_classes=3)
    network.classifier = nn.Sequential(
        nn.Linear(5 * 49, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 4), nn.ReLU(True), nn.Linear(4, 3)
    )
    return network


class Normed(nn.Module):
    """A residual stream and a branch under group norm; ``groups`` 1 is a layer norm over channels and places."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.branch, self.second = nn.Conv2d(8, 4, 3, padding=1), norm(4)
        self.back, self.third = nn.Conv2d(4, 8, 1), norm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.first(self.stem(x)))
        x = x + self.third(self.back(F.relu(self.second(self.branch(x)))))
        return self.fc(F.relu(x).mean((2, 3)))


class Written(nn.Module):
    """Attention written out, as many models have it, with a scale of the branch and a mean over tokens."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads, self.stem, self.norm = heads, nn.Conv2d(3, width, 4, stride=4), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        y = self.qkv(self.norm(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        return self.fc((x + self.out(y) * self.scale).mean(1))


class Grouped(nn.Module):
    """Grouped convolutions that change the width, with a bias, and a depthwise one with two outputs a channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 9, 3, padding=1, groups=3)
        self.between = nn.Conv2d(9, 4, 1)
        self.twice = nn.Conv2d(4, 8, 3, groups=4)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        return self.fc(F.relu(self.twice(self.between(x))).mean((2, 3)))


def mlp_with_layer_norm():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(), nn.Linear(7, 5),
        nn.LayerNorm(5, bias=False), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


FAMILIES = {  # name: (constructor, image size)
    "mlp": (lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), 2),
    "mlp with layer norm": (mlp_with_layer_norm, 2),
    "vgg": (lambda: narrow_vgg(False), 32),
    "vgg_bn": (lambda: narrow_vgg(True), 32),
    "resnet": (lambda: narrowed(resnet.BasicBlock), 32),
    "wide_resnet": (lambda: narrowed(resnet.Bottleneck, width_per_group=8), 32),
    "resnext": (lambda: narrowed(resnet.Bottleneck, groups=4, width_per_group=4), 32),
    "mobilenet_v2": (lambda: mobilenetv2.MobileNetV2(
        num_classes=3, width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2], [2, 16, 1, 2]]), 32),
    "grouped": (Grouped, 8),
    "group norm": (lambda: Normed(lambda c: nn.GroupNorm(2, c)), 8),
    "one group": (lambda: Normed(lambda c: nn.GroupNorm(1, c)), 8),
    "instance norm": (lambda: Normed(lambda c: nn.InstanceNorm2d(c, affine=True)), 8),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(4, 6, 1), CNBlockConfig(6, None, 1)], num_classes=3), 32),
    "written attention": (Written, 8),
    "vit": (lambda: vision_transformer.VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=3), 16),
}  # fmt: skip


def narrowed(block, **arguments):
    network = resnet.ResNet(block, [1, 1, 1, 1], num_classes=3, **arguments)
    network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(128 * block.expansion, 3)
    return network


def spread(network, seed):
    """Tokens, embeddings and layer scales of one image (1, ...) are random too."""
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return network
