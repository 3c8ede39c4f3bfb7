"""Images of a task as tensors: read, split, filtered by class and turned into the task's view.

Three splits that never overlap: `train` with labels, `calibration` without, `test` with. They depend on the
file alone, not on the seed in params.yaml: every stage and every view has the same images in the same split.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stages.core.images.archives import Archive
from stages.core.images.decoding import VIEWS, Decoder, Stream, ahead
from stages.core.images.formats import read_listing
from stages.core.images.formats.listing import Entries, Listing, open_image
from stages.core.images.kept import Index, find, make, recipe
from stages.core.runtime.cache import identity
from stages.core.runtime.device import generator
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors
from stages.core.settings.datasets import HOMES
from stages.core.settings.places import file_name
from stages.core.settings.profiles import Data

Split = Literal["train", "calibration", "test"]

DIGITS = 1797  # images of the UCI optical recognition of handwritten digits test set, as in scikit-learn
_DIGITS_TEST, _DIGITS_CALIBRATION = 500, 400
_VERSION = 1  # of all that turns a file into an array: a higher number makes the kept arrays anew
_SEED = 20160627  # of every split and order; fixed, see the module docstring


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 (n, c, h, w), labels int64 (n,) or None, and the class names the labels index.

    Many images are memory-mapped, or a ``Stream`` that decodes them as they are used.
    """

    images: Tensor | Stream
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_images(data: Data, split: Split, root: Path, limit: int | None = None) -> ImageSet:
    """Read one split of the file of ``data.key`` under ``root``, in a fixed random order (so the first m are a sample).

    The calibration split comes without labels. ``limit`` reads no more than that many images. What was decoded
    once is kept (stages.core.images.kept).

    Raises InputError when the file is missing, damaged or not of ``data.kind``, when it has no image for the
    split, or when it has no class of a name in ``data.classes``.
    """
    paths = [Path(root) / file_name(place) for place in data.places]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file (data.key: {data.key}); {HOMES[data.kind]}")
    if data.kind in _ARRAYS:
        images, labels, classes = _ARRAYS[data.kind](paths[0], data, split, limit)
        images = VIEWS[data.view](images).contiguous()
    else:
        images, labels, classes = _decoded(paths, data, split, limit)
    if not len(images):
        raise InputError(
            f"{paths[0]}: no images in the {split} split (data.calibration: {data.calibration:g})"
        )
    return ImageSet(images, None if split == "calibration" else labels, classes)


def _decoded(
    paths: list[Path], data: Data, split: Split, limit: int | None
) -> tuple[Tensor | Stream, Tensor, tuple[str, ...]]:
    """The images of an archive: as they were decoded before, or decoded now."""
    settings = data.model_dump(exclude={"key", "also", "mean", "std"})
    folder = recipe(_VERSION, files=[identity(path) for path in paths], split=split, **settings)
    images, index = find(folder, limit) or _fresh(paths, data, split, limit, folder)
    return images, torch.tensor(index.labels, dtype=torch.int64), index.classes


def _fresh(
    paths: list[Path], data: Data, split: Split, limit: int | None, folder: Path
) -> tuple[Tensor | Stream, Index]:
    """List the archive's images, decode the first ``limit`` of the split and keep them in ``folder``."""
    with ExitStack() as stack:
        archive = stack.enter_context(Archive(paths))
        listing = read_listing(archive, data)
        if split != "calibration" and not listing.labelled:
            raise InputError(
                f"{paths[0]}: its images have no labels; found split {split}, allowed: calibration"
            )
        entries, classes = choose(paths[0], data, split, listing)
        if not entries:
            raise InputError(
                f"{paths[0]}: no images in the {split} split (data.calibration: {data.calibration:g})"
            )
        names, labels = zip(*entries[:limit], strict=True)
        index = Index(list(labels), classes, len(entries))
        image = listing.image or partial(open_image, archive)
        resize = data.resize or data.size
        decoder = Decoder(paths[0].name, image, data.size, resize, data.channels, data.view)
        images = make(folder, decoder, names, index)
        if isinstance(images, Stream):
            stack.pop_all()  # it reads from the archive as long as it lives
        return images, index


def choose(path: Path, data: Data, split: Split, listing: Listing) -> tuple[Entries, tuple[str, ...]]:
    """The entries of a split in their fixed random order, labelled by the classes that are returned with them."""
    if data.label_space:
        classes, label = _numbered(path, listing, data.label_space)
    else:
        by_name = sorted(listing.classes) if data.order == "name" else listing.classes
        classes = select_classes(path, by_name, data.classes)
        label = {name: index for index, name in enumerate(classes)}
    groups: list[list[str]] = [[] for _ in listing.classes]
    for name, index in listing.test if split == "test" else listing.train:
        groups[index].append(name)
    members: Entries = []
    for position, (group, images) in enumerate(zip(listing.classes, groups, strict=True)):
        if group in label:
            kept = sorted(images)
            if split != "test":
                kept = _share(kept, data.calibration, position, split)
            members.extend((image, label[group]) for image in kept)
    order = torch.randperm(len(members), generator=generator(_SEED, len(members))).tolist()
    return [members[i] for i in order], classes


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std for uint8 (n, c, h, w) -> float32 (n, c, h, w); 1 or c numbers each."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).reshape(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).reshape(shape)
    return (images.float() / 255 - centre) / scale


@dataclass(frozen=True)
class Batches:
    """Normalised float32 batches (at most batch_size, c, h, w) of uint8 images, in order, on ``device``.

    Made anew at every pass, so no more than a batch is held in float32.
    """

    images: Tensor | Stream
    batch_size: int
    data: Data
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for _, batch in ahead(self.images, torch.arange(len(self.images)).split(self.batch_size)):
            yield normalise(batch.to(self.device), self.data.mean, self.data.std)


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


_ARRAYS = {"digits": _read_digits, "photographs": _read_photographs}


def _share(images: Sequence[str], share: float, position: int, split: Split) -> list[str]:
    """The calibration share of one class's train images, or the rest of them."""
    order = torch.randperm(len(images), generator=generator(_SEED, position)).tolist()
    count = round(share * len(images))
    return [images[i] for i in (order[:count] if split == "calibration" else order[count:])]


def _numbered(path: Path, listing: Listing, space: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of ``space`` labels, and the labels of the classes: their own numbers, with gaps where there are some."""
    numbers = listing.numbers or range(len(listing.classes))
    label = dict(zip(listing.classes, numbers, strict=True))
    if min(numbers) < 0 or max(numbers) >= space:
        raise InputError(
            f"{path}: data.label_space: found {space}; allowed: {max(numbers) + 1} or more, for numbers from 1"
        )
    names = [f"no class {number}" for number in range(space)]
    for name, number in label.items():
        names[number] = name
    return tuple(names), label


def select_classes(path: Path, found: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classes to use, in the order asked for; all where none are named."""
    for name in wanted or ():
        if name not in found:
            raise InputError(f"{path}: data.classes: found {name!r}; allowed: {', '.join(found)}")
    return tuple(dict.fromkeys(wanted or found))
