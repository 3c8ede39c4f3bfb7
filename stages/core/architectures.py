"""Network constructors by name, with their arguments checked: what `architecture` in params.yaml means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.errors import InputError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n, c_in, h, w) -> (n, c_out, h / stride, w / stride).

    The shortcut is the identity where the shapes agree, else a 1x1 convolution with batch norm (option B of
    He et al. 2016, Deep Residual Learning for Image Recognition, section 3.3).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """The CIFAR residual network: (n, channels, h, w) -> (n, classes), any h and w of at least 4.

    A 3x3 stem without pooling, three stages of (depth - 2) / 6 blocks of widths w, 2w and 4w, global average
    pooling and a linear head `fc`. He et al. 2016, section 4.2; their ResNet-20 is depth 20, width 16.
    """

    def __init__(self, depth: int, width: int = 16, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(c_in, c_out, stride)
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))


@dataclass(frozen=True)
class _Argument:
    """One argument of a constructor: all are whole numbers. ``default`` None: it must be given."""

    accepts: Callable[[int], bool]
    allowed: str
    default: int | None = None


@dataclass(frozen=True)
class _Entry:
    constructor: Callable[..., nn.Module]
    arguments: Mapping[str, _Argument]


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def constructor(classes: int) -> nn.Module:
        import torchvision.models  # here: slow to import, and needed by these four names only

        return getattr(torchvision.models, name)(weights=None, num_classes=classes)

    return constructor


_CLASSES = _Argument(lambda n: n >= 2, "a whole number from 2")
_RESNET = _Entry(
    ResNet,
    {
        "depth": _Argument(lambda n: n >= 8 and (n - 2) % 6 == 0, "8, 14, 20, ... (6n + 2)"),
        "width": _Argument(lambda n: n >= 1, "a whole number from 1", 16),
        "channels": _Argument(lambda n: n in (1, 3), "1 or 3", 3),
        "classes": _CLASSES,
    },
)
_REGISTRY: dict[str, _Entry] = {
    "resnet": _RESNET,
    **{
        name: _Entry(_torchvision(name), {"classes": _CLASSES})
        for name in ("resnet18", "resnet34", "resnet50", "resnet101")
    },
}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a freshly initialised network, in training mode, from the global random state.

    `resnet` takes depth, width, channels and classes (``ResNet``); `resnet18`, `resnet34`, `resnet50` and
    `resnet101` are torchvision's, without weights, and take classes. All can be traced by torch.fx.

    Raises InputError for an unknown name or argument, a missing one, or a value that is not allowed.
    """
    if name not in _REGISTRY:
        raise InputError(f"architecture.name: found {name!r}; allowed: {', '.join(_REGISTRY)}")
    entry = _REGISTRY[name]
    for key in arguments:
        if key not in entry.arguments:
            raise InputError(
                f"architecture.arguments: {name} knows no {key!r}; allowed: {', '.join(entry.arguments)}"
            )
    return entry.constructor(**{key: _value(key, arguments, spec) for key, spec in entry.arguments.items()})


def _value(key: str, arguments: Mapping[str, Any], spec: _Argument) -> int:
    if key not in arguments and spec.default is not None:
        return spec.default
    found = arguments.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not spec.accepts(found):
        kind = f"{found!r} ({type(found).__name__})" if key in arguments else "nothing"
        raise InputError(f"architecture.arguments.{key}: found {kind}; allowed: {spec.allowed}")
    return found
