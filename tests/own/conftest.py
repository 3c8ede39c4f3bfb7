"""Two small networks that were trained on pictures of plain colours, with the pictures, as files of a user's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from stages.core.images.batches import normalise
from stages.core.networks.architectures import build

MEAN, STD = [0.8], [0.1]  # of the training: no usual ones
PIXELS = 12


def pictures(seed: int, label: int, count: int, draw: torch.Generator) -> torch.Tensor:
    colour = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(100 * seed + label)) * 200
    return (colour + 50 * torch.rand(count, 3, PIXELS, PIXELS, generator=draw)).to(torch.uint8)


def make(top: Path, name: str, seed: int, classes: int) -> None:
    """<top>/<name>.pth, <top>/<name>/{train,test}/<class>/*.png"""
    draw, found, labels = torch.Generator().manual_seed(seed), [], []
    for label in range(classes):
        for part, count in (("train", 16), ("test", 8)):
            folder = top / name / part / f"{name} {label}"
            folder.mkdir(parents=True)
            images = pictures(seed, label, count, draw)
            for index, image in enumerate(images):
                Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(folder / f"{index}.png")
            if part == "train":
                found.append(images)
                labels += [label] * count
    x, y = normalise(torch.cat(found), MEAN, STD), torch.tensor(labels)
    torch.manual_seed(seed)
    network = build("resnet", {"depth": 8, "width": 4, "classes": classes}).train()
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimiser.step()
    torch.save({"model": network.state_dict()}, top / f"{name}.pth")


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A folder with first.pth and first/ (4 classes), second.pth and second/ (3 classes)."""
    top = tmp_path_factory.mktemp("a users files")
    for seed, (name, classes) in enumerate({"first": 4, "second": 3}.items()):
        make(top, name, seed, classes)
    return top
