"""Images of a task as tensors: read, split, filtered by class and turned into the task's view.

Three splits that never overlap: `train` with labels, `calibration` without, `test` with. They depend on the
file alone, not on the seed in params.yaml: every stage and every view has the same images in the same split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stages.core.artifacts import read_tensors
from stages.core.device import generator
from stages.core.errors import InputError
from stages.core.image_folder import ImageFolder
from stages.core.profiles import Data

Split = Literal["train", "calibration", "test"]

DIGITS = 1797  # images of the UCI optical recognition of handwritten digits test set, as in scikit-learn
_DIGITS_TEST, _DIGITS_CALIBRATION = 500, 400
_SEED = 20160627  # of every split and order; fixed, see the module docstring


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 (n, c, h, w), labels int64 (n,) or None, and the class names the labels index."""

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "rotated": lambda x: torch.rot90(x, 1, (2, 3)),
    "inverted": lambda x: 255 - x,
    "mirrored": lambda x: torch.rot90(x, 3, (2, 3)).flip(3),
}
"""Bijections of uint8 images (n, c, h, h), each a domain of its own."""


def load_images(data: Data, split: Split, root: Path, limit: int | None = None) -> ImageSet:
    """Read one split of the file ``root / data.key``, in a fixed random order (so the first m are a sample).

    The calibration split comes without labels. ``limit`` reads no more than that many images.

    Raises InputError when the file is missing, damaged or not of ``data.kind``, when it has no image for the
    split, or when it has no class of a name in ``data.classes``.
    """
    path = Path(root) / data.key
    if not path.is_file():
        raise InputError(f"{path}: no such file (data.key: {data.key})")
    images, labels, classes = _READERS[data.kind](path, data, split, limit)
    if not len(images):
        raise InputError(f"{path}: no images in the {split} split (data.calibration: {data.calibration:g})")
    images = VIEWS[data.view](images).contiguous()
    return ImageSet(images, None if split == "calibration" else labels, classes)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std for uint8 (n, c, h, w) -> float32 (n, c, h, w); 1 or c numbers each."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).reshape(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).reshape(shape)
    return (images.float() / 255 - centre) / scale


def batches(images: Tensor, batch_size: int, data: Data, device: torch.device) -> Iterator[Tensor]:
    """Normalised float32 batches (at most batch_size, c, h, w) of uint8 images (n, c, h, w), in order."""
    for batch in images.split(batch_size):
        yield normalise(batch.to(device), data.mean, data.std)


def _read_digits(
    path: Path, data: Data, split: Split, limit: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    tensors, _ = read_tensors(path)
    images, labels = tensors.get("images"), tensors.get("labels")
    shape = (DIGITS, data.size, data.size)
    whole = images is not None and images.dtype == torch.uint8 and tuple(images.shape) == shape
    if (
        not whole
        or labels is None
        or tuple(labels.shape) != shape[:1]
        or set(labels.tolist()) != set(range(10))
    ):
        found = {name: (str(tensor.dtype), *tensor.shape) for name, tensor in tensors.items()}
        raise InputError(f"{path}: found {found}; allowed: labels 0 to 9 and uint8 images of shape {shape}")
    order = torch.randperm(DIGITS, generator=generator(_SEED))
    test, calibration, train = order.split(
        [_DIGITS_TEST, _DIGITS_CALIBRATION, DIGITS - _DIGITS_TEST - _DIGITS_CALIBRATION]
    )
    chosen = {"train": train, "calibration": calibration, "test": test}[split]
    classes = select_classes(path, tuple(str(digit) for digit in range(10)), data.classes)
    index = torch.full((10,), -1)
    for new, name in enumerate(classes):
        index[int(name)] = new
    chosen = chosen[index[labels[chosen]] >= 0][:limit]
    return images[chosen].unsqueeze(1).expand(-1, data.channels, -1, -1), index[labels[chosen]], classes


def _read_photographs(
    path: Path, data: Data, split: Split, limit: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    if split != "calibration":
        raise InputError(f"{path}: photographs have no {split} split; allowed: as a proxy, for calibration")
    tensors, _ = read_tensors(path)
    images = tensors.get("images", torch.empty(0))
    if images.dtype != torch.uint8 or images.shape[1:] != (3, data.size, data.size):
        raise InputError(
            f"{path}: found {images.dtype} images of shape {tuple(images.shape)}; "
            f"allowed: uint8 images of shape (n, 3, {data.size}, {data.size})"
        )
    images = images[:limit]
    if data.channels == 1:  # luminance, ITU-R BT.601, as PIL converts
        weight = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = (images.float() * weight).sum(1, keepdim=True).round().to(torch.uint8)
    return images, torch.zeros(len(images), dtype=torch.int64), ()


def _read_folder(
    path: Path, data: Data, split: Split, limit: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    with ImageFolder(path) as folder:
        classes = select_classes(path, folder.classes, data.classes)
        members: list[tuple[str, int]] = []
        for name, images in folder.images["test" if split == "test" else "train"].items():
            if split != "test":
                images = _share(images, data.calibration, folder.classes.index(name), split)
            if name in classes:
                members.extend((image, classes.index(name)) for image in images)
        order = torch.randperm(len(members), generator=generator(_SEED, len(members)))[:limit].tolist()
        names = [members[i][0] for i in order]
        labels = torch.tensor([members[i][1] for i in order], dtype=torch.int64)
        return folder.read(names, data.size, data.channels), labels, classes


_READERS = {"digits": _read_digits, "photographs": _read_photographs, "folder": _read_folder}


def _share(images: Sequence[str], share: float, position: int, split: Split) -> list[str]:
    """The calibration share of one class's train images, or the rest of them."""
    order = torch.randperm(len(images), generator=generator(_SEED, position)).tolist()
    count = round(share * len(images))
    return [images[i] for i in (order[:count] if split == "calibration" else order[count:])]


def select_classes(path: Path, found: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classes to use, in the order asked for; all where none are named."""
    for name in wanted or ():
        if name not in found:
            raise InputError(f"{path}: data.classes: found {name!r}; allowed: {', '.join(found)}")
    return tuple(dict.fromkeys(wanted or found))
