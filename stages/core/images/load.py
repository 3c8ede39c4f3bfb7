"""Images of a task as tensors: read, split, filtered by class and turned into the task's view.

Three splits that never overlap: `train` with labels, `calibration` without, `test` with. They depend on the
file alone, not on the seed in params.yaml: every stage and every view has the same images in the same split.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stages.core.images.archives import Archive
from stages.core.images.arrays import READERS
from stages.core.images.classes import Split, choose
from stages.core.images.decoding import VIEWS, Decoder, Stream
from stages.core.images.formats.kinds import read_listing
from stages.core.images.formats.listing import open_image
from stages.core.images.kept import Index, find, make, recipe
from stages.core.runtime.cache import identity
from stages.core.runtime.errors import InputError
from stages.core.settings.datasets import HOMES
from stages.core.settings.places import file_name
from stages.core.settings.profiles import Data

_VERSION = 3  # of all that turns a file into an array: a higher number makes the kept arrays anew


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
    if data.kind in READERS:
        images, labels, classes = READERS[data.kind](paths[0], data, split, limit)
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
    settings = data.model_dump(exclude={"key", "also", "mean", "std", "limits"})
    folder = recipe(_VERSION, files=[identity(path) for path in paths], split=split, **settings)
    images, index = find(folder, limit) or _fresh(paths, data, split, limit, folder)
    return images, torch.tensor(index.labels, dtype=torch.int64), index.classes


def _fresh(
    paths: list[Path], data: Data, split: Split, limit: int | None, folder: Path
) -> tuple[Tensor | Stream, Index]:
    """List the archive's images, decode the first ``limit`` of the split and keep them in ``folder``."""
    with ExitStack() as stack:
        archive = stack.enter_context(Archive(paths, data.limits))
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
        decoder = Decoder(
            paths[0].name, image, data.size, resize, data.channels, data.view, data.limits.pixels
        )
        images = make(folder, decoder, names, index)
        if isinstance(images, Stream):
            stack.pop_all()  # it reads from the archive as long as it lives
        return images, index
