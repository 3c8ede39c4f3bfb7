"""A network tried on its own labelled images: does it run, how right is it, and which preprocessing suits it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.core.images.batches import normalise
from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Architecture, Data
from stages.own.folder import Folder

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PIXELS_OF_A_TRY = 200 * 64**2  # of one try: 200 images of 64 pixels
SMALL = 96  # images of at most as many pixels are taken as they are


@dataclass(frozen=True)
class Tried:
    """One way to preprocess: its name, its keys of `data`, and how right the network then is (percent, and loss)."""

    name: str
    settings: dict[str, Any]
    accuracy: float
    loss: float


def one_image(network: nn.Module, data: Data, where: str) -> int:
    """Run the network on one image; returns the number of its outputs. Raises InputError where it cannot."""
    x = torch.zeros(1, data.channels, data.size, data.size)
    try:
        with torch.no_grad():
            found = network(x)
    except Exception as error:  # whatever a network of someone else raises
        raise InputError(
            f"{where}: does not run on an image of {data.channels} channels and {data.size} pixels "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); allowed: --size, --channels as trained"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise InputError(f"{where}: gives {_kind(found)} for an image; allowed: one row of logits")
    return int(found.shape[1])


@torch.no_grad()
def right(network: nn.Module, images: Tensor, labels: Tensor, data: Data) -> tuple[float, float]:
    """Percent of uint8 images (n, c, h, w) whose largest logit is the label's, and the mean cross-entropy."""
    logits = torch.cat([network(normalise(x, data.mean, data.std)) for x in images.split(50)])
    hits = int((logits.argmax(1) == labels).sum())
    return 100.0 * hits / len(labels), float(F.cross_entropy(logits, labels))


def how_many(data: Data) -> int:
    """Images of one try, so that it takes seconds."""
    return max(40, min(400, PIXELS_OF_A_TRY // data.size**2))


def compare(
    network: nn.Module, folder: Folder, data: Data, choices: list[tuple[str, dict[str, Any]]]
) -> list[Tried]:
    """Each choice tried on labelled train images, the best first; of equals the surer one."""
    tried, samples = [], {}
    for name, settings in choices:
        own = Data.model_validate({**data.model_dump(), **settings})
        key = (own.size, own.resize)
        if key not in samples:
            samples[key] = folder.sample(own, "train", how_many(own))
        images, labels = samples[key]
        tried.append(Tried(name, settings, *right(network, images, labels, own)))
    return sorted(tried, key=lambda own: (-own.accuracy, own.loss))


def sizes(architecture: Architecture, folder: Folder) -> list[tuple[str, dict[str, Any]]]:
    """How large the images may have been in the training: (name, size and resize), the likeliest first."""
    arguments, small = architecture.arguments, folder.side if folder.side and folder.side <= SMALL else None
    if "size" in arguments:  # the network says so itself
        size = arguments["size"]
        return [(f"{size} pixels", {"size": size, "resize": round(size * 256 / 224)})]
    if architecture.name == "mlp":
        side = round((arguments["inputs"] / channels(architecture)) ** 0.5)
        return [(f"{side} pixels", {"size": side, "resize": None})]
    own = [(f"{small} pixels, as they are", {"size": small, "resize": None})] if small and small >= 8 else []
    large = [("224 of 256 pixels", {"size": 224, "resize": 256})]
    if architecture.name == "resnet":
        return own or [("32 pixels", {"size": 32, "resize": None})]
    return [*own, *large]


def scalings(folder: Folder, data: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    """The usual ways to scale pixels, and the images' own mean and deviation."""
    if data.channels == 3:
        yield "ImageNet's mean and deviation", IMAGENET
    yield "-1 to 1", {"mean": [0.5], "std": [0.5]}
    yield "0 to 1", {"mean": [0.0], "std": [1.0]}
    images, _ = folder.sample(data, "train", how_many(data))
    pixels = images.float().div(255).transpose(0, 1).flatten(1)  # (c, n h w)
    mean, std = ([round(v, 4) for v in of.tolist()] for of in (pixels.mean(1), pixels.std(1).clamp(min=1e-3)))
    yield "the images' own mean and deviation", {"mean": mean, "std": std}


def channels(architecture: Architecture) -> int:
    """1 where the network says so or its inputs are a square of pixels, else 3."""
    inputs = architecture.arguments.get("inputs")
    if inputs is not None:
        return 3 if inputs % 3 == 0 and round((inputs / 3) ** 0.5) ** 2 * 3 == inputs else 1
    return architecture.arguments.get("channels", 3)


def _kind(found: Any) -> str:
    return (
        f"a tensor of shape {tuple(found.shape)}"
        if isinstance(found, Tensor)
        else f"a {type(found).__name__}"
    )
