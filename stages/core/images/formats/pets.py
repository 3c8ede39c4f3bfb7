"""Oxford-IIIT Pets: `images/*.jpg` and the lists `annotations/trainval.txt` and `test.txt`, 37 breeds."""

from stages.core.images.archives import Archive
from stages.core.images.formats.listing import (
    Listing,
    check_present,
    folder_of,
    numbered_from_one,
    table,
    whole_number,
)
from stages.core.runtime.errors import InputError


def read(archive: Archive, title: str) -> Listing:
    """Classes in the order of the lists' class numbers, named as in the file names. Raises InputError."""
    lists = folder_of(archive, "annotations/trainval.txt", title)
    images = folder_of(archive, "images/", title)
    names: dict[int, str] = {}
    splits = []
    for part in ("trainval", "test"):
        source = f"{lists}annotations/{part}.txt"
        if source not in archive:
            raise InputError(f"{archive.path}: no {source} in it; the whole data set: {title}")
        rows = []
        for image, number, _, _ in table(archive, source, 4):  # name, class, species, breed of the species
            label = whole_number(archive, source, number)
            breed = image.rpartition("_")[0]
            if names.setdefault(label, breed) != breed:
                raise InputError(
                    f"{archive.path}: {source}: class {label} is both {names[label]} and {breed}"
                )
            rows.append((f"{images}images/{image}.jpg", label))
        check_present(archive, (name for name, _ in rows), source, title)
        splits.append(rows)
    return numbered_from_one(names, *splits)
