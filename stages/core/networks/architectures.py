"""Network constructors by name, with their arguments checked: what `architecture` in params.yaml means."""

import importlib
import inspect
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from stages.core.networks.outputs import with_logits_alone
from stages.core.runtime.errors import InputError


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


def mlp(inputs: int, widths: Sequence[int], classes: int) -> nn.Sequential:
    """(n, ...) of ``inputs`` entries each -> (n, classes): a Linear and a ReLU for each of ``widths``, then `fc`."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (c_in, c_out) in enumerate(itertools.pairwise([inputs, *widths]), start=1):
        layers |= {f"linear{i}": nn.Linear(c_in, c_out), f"relu{i}": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, fc=nn.Linear([inputs, *widths][-1], classes)))


@dataclass(frozen=True)
class _Argument:
    """One argument of a constructor: a whole number, or a list of them. ``default`` None: it must be given."""

    accepts: Callable[[int], bool]
    allowed: str
    default: int | None = None
    several: bool = False


@dataclass(frozen=True)
class _Entry:
    constructor: Callable[..., nn.Module]
    arguments: Mapping[str, _Argument]


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def constructor(classes: int, **arguments: int) -> nn.Module:
        import torchvision.models  # here: slow to import, and needed by these names only

        if "size" in arguments:
            arguments["image_size"] = arguments.pop("size")
        return getattr(torchvision.models, name)(weights=None, num_classes=classes, **arguments)

    return constructor


_CLASSES = _Argument(lambda n: n >= 2, "a whole number from 2")
_RESNET = _Entry(
    ResNet,
    {
        "depth": _Argument(
            lambda n: 8 <= n <= 2000 and (n - 2) % 6 == 0, "8, 14, 20, ... (6n + 2, up to 2000)"
        ),
        "width": _Argument(lambda n: n >= 1, "a whole number from 1", 16),
        "channels": _Argument(lambda n: n in (1, 3), "1 or 3", 3),
        "classes": _CLASSES,
    },
)
_MLP = _Entry(
    mlp,
    {
        "inputs": _Argument(lambda n: n >= 1, "a whole number from 1"),
        "widths": _Argument(lambda n: n >= 1, "a list of whole numbers from 1", several=True),
        "classes": _CLASSES,
    },
)
_VIT = {"size": _Argument(lambda n: n >= 16 and n % 16 == 0, "a multiple of 16", 224), "classes": _CLASSES}
_TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d"),
    *("vgg11", "vgg11_bn", "vgg16", "vgg16_bn", "mobilenet_v2"),
)
_REGISTRY: dict[str, _Entry] = {
    "resnet": _RESNET,
    "mlp": _MLP,
    **{name: _Entry(_torchvision(name), {"classes": _CLASSES}) for name in _TORCHVISION},
    "vit_b_16": _Entry(_torchvision("vit_b_16"), _VIT),
}
ARCHITECTURES = tuple(_REGISTRY)


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a freshly initialised network, in training mode, from the global random state.

    `resnet` takes depth, width, channels and classes (``ResNet``), `mlp` inputs, widths and classes (``mlp``). The
    other names are torchvision's, without weights, and take classes; `vit_b_16` also size, in pixels. A name
    `package.module:function` is any other constructor that can be imported, `timm:create_model` say: it is called
    with the arguments as they are, `classes` as `num_classes`, `n_classes` or the like where it knows no `classes`; of
    what it returns the logits alone are read (stages.core.networks.outputs).

    Raises InputError for an unknown name or argument, a missing one, a value that is not allowed, and a constructor
    that cannot be imported or called.
    """
    check_architecture(name, arguments)
    if ":" in name:
        constructor, given = _imported(name, arguments)
        return with_logits_alone(_within_memory(lambda: _called(name, constructor, given), given))
    entry = _REGISTRY[name]
    given = {key: _value(key, arguments, spec) for key, spec in entry.arguments.items()}
    return _within_memory(lambda: entry.constructor(**given), given)


def check_architecture(name: str, arguments: Mapping[str, Any]) -> None:
    """What of an architecture can be checked without building it. Raises InputError as ``build`` does."""
    if ":" in name:
        return
    if name not in _REGISTRY:
        raise InputError(
            f"architecture.name: found {name!r}; allowed: {', '.join(_REGISTRY)}, or package.module:function"
        )
    entry = _REGISTRY[name]
    for key in arguments:
        if key not in entry.arguments:
            raise InputError(
                f"architecture.arguments: {name} knows no {key!r}; allowed: {', '.join(entry.arguments)}"
            )
    for key, spec in entry.arguments.items():
        _value(key, arguments, spec)


LARGE_NUMBER = 4096  # of an argument, from which on a network is counted before it is built


def _within_memory(make: Callable[[], nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """What ``make`` builds. Raises InputError where its tensors would not fit into the memory that is free."""
    numbers = [n for value in arguments.values() for n in (value if isinstance(value, list) else [value])]
    if max((n for n in numbers if isinstance(n, int)), default=0) > LARGE_NUMBER:
        with torch.device("meta"):
            needed = sum(tensor.nbytes for tensor in make().state_dict().values())
        if needed > (free := psutil.virtual_memory().available):
            raise InputError(
                f"architecture.arguments: the network needs {needed / 2**30:.1f} GiB; allowed: the "
                f"{free / 2**30:.1f} GiB that are free"
            )
    return make()


def _value(key: str, arguments: Mapping[str, Any], spec: _Argument) -> int | list[int]:
    if key not in arguments and spec.default is not None:
        return spec.default
    found = arguments.get(key)
    several = isinstance(found, list | tuple) and spec.several
    entries = found if several else [found]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and spec.accepts(n) for n in entries)
    if not whole or several != spec.several:
        kind = f"{found!r} ({type(found).__name__})" if key in arguments else "nothing"
        raise InputError(f"architecture.arguments.{key}: found {kind}; allowed: {spec.allowed}")
    return found


CLASSES_SPELLED = (
    "num_classes",
    "n_classes",
    "nb_classes",
    "num_class",
    "n_class",
    "nclasses",
    "nclass",
    "num_labels",
)
"""What other constructors call the number of classes."""


def _imported(name: str, arguments: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """What ``package.module:function`` names, and the arguments as it calls them."""
    where, _, attribute = name.partition(":")
    try:
        constructor = getattr(importlib.import_module(where), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"architecture.name: {name} cannot be imported ({_line(error)}); allowed: package.module:function, "
            "installed or in this folder"
        ) from error
    if not _defines_networks(constructor):
        raise InputError(
            f"architecture.name: {name} is {_described(constructor)}; allowed: a class of torch modules, or a function "
            "of a package that uses torch"
        )
    given = dict(arguments)
    try:
        known = inspect.signature(constructor).parameters
        if "classes" in given and "classes" not in known:
            given[next((name for name in CLASSES_SPELLED if name in known), "num_classes")] = given.pop(
                "classes"
            )
    except (TypeError, ValueError):
        pass  # no signature that could be read: as they are
    return constructor, given


def _described(found: Any) -> str:
    return f"{type(found).__name__} of {getattr(found, '__module__', None) or 'no module'}"


def _defines_networks(found: Any) -> bool:
    """Whether something is meant to build networks, which is looked at before it is called."""
    if inspect.isclass(found):
        return issubclass(found, nn.Module)
    if not inspect.isfunction(found):
        return False
    package = found.__module__.partition(".")[0]
    own = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == package]
    return package != "torch" and any(_uses_torch(vars(module)) for module in own if module is not None)


def _uses_torch(names: Mapping[str, Any]) -> bool:
    return any(value in (torch, nn) for value in list(names.values()) if inspect.ismodule(value))


def _called(name: str, constructor: Callable[..., nn.Module], given: dict[str, Any]) -> nn.Module:
    try:
        network = constructor(**given)
    except Exception as error:  # whatever a constructor of someone else raises
        raise InputError(
            f"architecture.arguments: {name} cannot be called with {', '.join(given) or 'nothing'} ({_line(error)}); "
            "allowed: arguments it knows"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"architecture.name: {name} gave {type(network).__name__}; allowed: a function that builds a torch module"
        )
    return network


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
