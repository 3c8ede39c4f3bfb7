"""The pairs that are merged: networks with random weights and images of noise, which take the time that others do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from stages.core.networks.architectures import build


@dataclass(frozen=True)
class Pair:
    make: Callable[[], nn.Module]
    image: tuple[int, int, int]
    images: int  # of each task


def _resnet(depth: int, width: int, channels: int, classes: int) -> Callable[[], nn.Module]:
    arguments = {"depth": depth, "width": width, "channels": channels, "classes": classes}
    return lambda: build("resnet", arguments)


PAIRS = {
    "digits": Pair(_resnet(8, 16, 1, 10), (1, 16, 16), 400),
    "resnet8": Pair(_resnet(8, 32, 3, 5), (3, 32, 32), 400),
    "resnet20": Pair(_resnet(20, 16, 3, 5), (3, 32, 32), 400),
    "resnet50": Pair(lambda: torchvision.models.resnet50(num_classes=2), (3, 224, 224), 16),
}


def networks(pair: Pair) -> dict[str, nn.Module]:
    """Two of them, with statistics as a trained network has: those of its own values."""
    found = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        network = pair.make()
        with torch.no_grad():
            network.train()(torch.randn(8, *pair.image))
        found[name] = network.eval()
    return found


def batches(pair: Pair, images: int, size: int = 100) -> dict[str, list[Tensor]]:
    """Of both tasks."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: list(torch.randn(images, *pair.image, generator=generator).split(size))
        for name in ("first", "second")
    }
