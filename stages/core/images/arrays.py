"""Data sets that are one file of arrays: the digits and the photographs that come with scikit-learn."""

from pathlib import Path

import torch
from torch import Tensor

from stages.core.images.classes import SPLIT_SEED, Split, select_classes
from stages.core.runtime.device import generator
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors
from stages.core.settings.profiles import Data

DIGITS = 1797  # images of the UCI optical recognition of handwritten digits test set, as in scikit-learn
_DIGITS_TEST, _DIGITS_CALIBRATION = 500, 400


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
    order = torch.randperm(DIGITS, generator=generator(SPLIT_SEED))
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


READERS = {"digits": _read_digits, "photographs": _read_photographs}
