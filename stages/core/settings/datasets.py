"""The data sets by name: what kinds there are, in which views, and where to get them, for error messages."""

import posixpath
from collections.abc import Iterable
from typing import Literal

from stages.core.runtime.errors import some

View = Literal["upright", "rotated", "inverted", "mirrored", "edges"]


Kind = Literal[
    "digits",
    "photographs",
    "folder",
    "cifar10",
    "cifar100",
    "pets",
    "cub",
    "dogs",
    "nabirds",
    "domainnet",
    "imagenet",
]
Domain = Literal["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]

HOMES = {
    "digits": "made by source: embedded",
    "photographs": "made by source: embedded",
    "folder": "a zip or tar file of train/<class>/<image> and test/<class>/<image>",
    "cifar10": "CIFAR-10 python version from https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "CIFAR-100 python version from https://www.cs.toronto.edu/~kriz/cifar.html",
    "pets": "Oxford-IIIT Pets, images and annotations, from https://www.robots.ox.ac.uk/~vgg/data/pets/",
    "cub": "CUB-200-2011 from https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "dogs": "Stanford Dogs, images and lists, from http://vision.stanford.edu/aditya86/ImageNetDogs/",
    "nabirds": "NABirds from https://dl.allaboutbirds.org/nabirds",
    "domainnet": "DomainNet, a domain's zip file and its two split lists, from https://ai.bu.edu/M3SDA/",
    "imagenet": "ImageNet (ILSVRC 2012) from https://www.image-net.org/download.php",
}

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGES


def level_of_part(name: str) -> int | None:
    """At which level of its path `train` or `test` stands, below one top folder at most; None: a `folder` lacks it."""
    levels = name.split("/")
    return next((d for d in (0, 1) if levels[d : d + 1] in (["train"], ["test"])), None)


def passed_over(names: Iterable[str]) -> str | None:
    """What to say of the files that a `folder` is not read for, as some may be meant as images; None: of nothing."""
    left = [name for name in names if level_of_part(name) is None or not is_image(name)]
    many = f"{len(left)} file" + "s" * (len(left) > 1)
    return f"passed over {many}, not {' '.join(IMAGES)} in train/ or test/: {some(left, 2)}" if left else None
