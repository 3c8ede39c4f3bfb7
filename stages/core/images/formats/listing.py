"""What every reader of a data set's format gives: the images by name and class, none of them decoded yet."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.core.images.archives import Archive
from stages.core.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
    "GIF",
)  # by content; some of Oxford's and Stanford's .jpg are others of these

Entries = list[tuple[str, int]]  # (name of an image, index of its class)


@dataclass(frozen=True)
class Listing:
    """The official train and test images of a data set.

    ``classes`` in the order of the data set's own numbering. ``image`` opens an entry; None: it is a file of the
    archive. ``labelled`` False: the classes are unknown, and every index is 0. ``numbers``: the data set's own number
    of each class, counted from 0; None: 0, 1, 2, ...
    """

    classes: tuple[str, ...]
    train: Entries
    test: Entries
    image: "Callable[[str], Image] | None" = None
    labelled: bool = True
    numbers: tuple[int, ...] | None = None


def numbered_from_one(names: dict[int, str], train: Entries, test: Entries) -> Listing:
    """A listing of images by the data set's own class numbers, which count from 1. names: of the classes."""
    labels = sorted(names)
    index = {label: position for position, label in enumerate(labels)}
    train, test = ([(name, index[label]) for name, label in rows] for rows in (train, test))
    classes = tuple(names[label] for label in labels)
    return Listing(classes, train, test, numbers=tuple(label - 1 for label in labels))


def open_image(archive: Archive, name: str) -> "Image":
    """An image whose header is read. No other decoder is asked: that of PostScript starts a program.

    Raises InputError, and what PIL raises for a damaged header.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(archive.read(name)), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{archive.path}: {name}: not a readable image; allowed: {', '.join(FORMATS)}"
        ) from error


def folder_of(archive: Archive, landmark: str, title: str) -> str:
    """The folder (with a final `/`, or "") in which ``landmark`` lies; the shortest where there are several.

    A landmark that ends with `/` is a folder. Raises InputError when it is nowhere.
    """
    found = set()
    for name in archive.names:
        if landmark.endswith("/"):
            before, there, _ = f"/{name}".partition(f"/{landmark}")
            if there:
                found.add(f"{before[1:]}/" if before else "")
        elif name == landmark or name.endswith(f"/{landmark}"):
            found.add(name.removesuffix(landmark))
    if not found:
        raise missing(archive, landmark, title)
    return min(found, key=lambda folder: (folder.count("/"), folder))


def table(archive: Archive, name: str, columns: int) -> list[list[str]]:
    """The lines of a text file, split at the first ``columns - 1`` spaces. Raises InputError."""
    lines = archive.read(name).decode("utf-8", "replace").splitlines()
    rows = [line.split(maxsplit=columns - 1) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise InputError(
                f"{archive.path}: {name}: row {number}: found {len(row)} columns; allowed: {columns}"
            )
    return rows


def check_present(archive: Archive, names: Iterable[str], source: str, title: str) -> None:
    """Raises InputError when an image that the list ``source`` names is not in the archive."""
    lost = [name for name in names if name not in archive]
    if lost:
        raise InputError(
            f"{archive.path}: {len(lost)} of the images that {source} lists are missing ({lost[0]}"
            f"{', ...' if len(lost) > 1 else ''}); the whole data set: {title}"
        )


def missing(archive: Archive, what: str, title: str) -> InputError:
    """One line: what was looked for, where, what is there instead, where to get it."""
    tops = sorted({name.split("/")[0] + "/" * ("/" in name) for name in archive.names})
    found = ", ".join(tops[:4]) + (", ..." if len(tops) > 4 else "") if tops else "nothing, it is empty"
    return InputError(f"{archive.path}: no {what} in it (found: {found}); allowed: {title}")


def whole_number(archive: Archive, name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{archive.path}: {name}: found {text!r}; allowed: a whole number") from error
