"""What is in a folder of images, or an archive of one: its classes, how many images and of what size."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stages.core.images.archives import Archive
from stages.core.images.classes import Split, choose
from stages.core.images.decoding import Decoder
from stages.core.images.formats import folder as format
from stages.core.images.formats.listing import Listing, open_image
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import files_below
from stages.core.settings.datasets import passed_over
from stages.core.settings.profiles import Data

LOOKED_AT = 100  # images whose sizes are read


class Tree:
    """The files of a folder by name, as ``Archive`` has those of an archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(file.relative_to(path).as_posix() for file in files_below(path))

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise InputError(f"{self.path / name}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Folder:
    """Images by class: ``listing``, how to open them, and (width, height) of some with how often each is."""

    path: Path
    listing: Listing
    tree: Tree | Archive
    sizes: Counter[tuple[int, int]]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.listing.classes

    @property
    def side(self) -> int | None:
        """The side of the images where all are squares of one size."""
        (width, height), *others = self.sizes
        return width if width == height and not others else None

    def described(self) -> str:
        """One line: classes, images, sizes."""
        shown = ", ".join(self.classes[:4]) + (", ..." if len(self.classes) > 4 else "")
        (width, height), count = self.sizes.most_common(1)[0]
        left = passed_over(self.tree.names)
        share = "all" if count == self.sizes.total() else f"{count} of {self.sizes.total()}"
        return (
            f"{len(self.classes)} classes ({shown}), {len(self.listing.train)} train and {len(self.listing.test)} "
            f"test images, {share} of {width}x{height} pixels{f'; {left}' if left else ''}"
        )

    def sample(self, data: Data, split: Split, count: int) -> tuple[Tensor, Tensor]:
        """The first images of a split as the pipeline has them: uint8 (n, c, size, size), and labels (n,)."""
        entries, _ = choose(self.path, data, split, self.listing)
        names, labels = zip(*entries[:count], strict=True)
        opened = partial(open_image, self.tree)
        decoder = Decoder(
            str(self.path), opened, data.size, data.resize or data.size, data.channels, data.view
        )
        return torch.cat(list(decoder.chunks(names))), torch.tensor(labels)


def look(path: Path) -> Folder:
    """Look at `<path>/{train,test}/<class>/*`, or an archive of that.

    Raises InputError where it is not there, is no such folder, or has an image that cannot be read.
    """
    if not path.exists():
        raise InputError(
            f"{path}: no such folder or archive; allowed: train/<class>/ and test/<class>/ with images"
        )
    tree = Tree(path) if path.is_dir() else Archive([path])
    listing = format.read(tree)
    names = [name for name, _ in listing.train]
    return Folder(path, listing, tree, _sizes(tree, names[:: -(-len(names) // LOOKED_AT)]))


def _sizes(tree: Tree | Archive, names: Sequence[str]) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for name in names:
        try:
            with Image.open(io.BytesIO(tree.read(name))) as image:
                found[image.size] += 1
        except (UnidentifiedImageError, OSError) as error:
            said = str(error).partition("<")[0].strip()  # without the address of what was read
            raise InputError(f"{tree.path}: {name}: not a readable image ({said})") from error
    return found
