"""Stanford Dogs: `Images/<class>/*.jpg` with the lists train_list.mat and test_list.mat, 120 breeds."""

import io

from stages.core.images.archives import Archive
from stages.core.images.formats.listing import Entries, Listing, check_present, folder_of, numbered_from_one
from stages.core.runtime.errors import InputError


def read(archive: Archive, title: str) -> Listing:
    """Classes in the order of the lists' numbers, named as the folders (`n02085620-Chihuahua`). Raises InputError."""
    images = folder_of(archive, "Images/", title)
    names: dict[int, str] = {}
    splits = []
    for part in ("train", "test"):
        source = folder_of(archive, f"{part}_list.mat", title) + f"{part}_list.mat"
        rows = _rows(archive, source)
        for file, label in rows:
            breed = file.split("/")[0]
            if names.setdefault(label, breed) != breed:
                raise InputError(
                    f"{archive.path}: {source}: class {label} is both {names[label]} and {breed}"
                )
        found = [(f"{images}Images/{file}", label) for file, label in rows]
        check_present(archive, (name for name, _ in found), source, title)
        splits.append(found)
    return numbered_from_one(names, *splits)


def _rows(archive: Archive, source: str) -> Entries:
    """(file, class number) of a list: cell array `file_list` and column `labels`."""
    from scipy.io import loadmat  # here: slow to import

    content = archive.read(source)
    try:
        found = loadmat(io.BytesIO(content))
        files = [str(cell.item()) for cell in found["file_list"].ravel()]
        labels = [int(label) for label in found["labels"].ravel()]
    # scipy raises nearly anything for a damaged file.
    except Exception as error:
        raise InputError(
            f"{archive.path}: {source}: not a MATLAB file with file_list and labels ({error})"
        ) from error
    if len(files) != len(labels):
        raise InputError(f"{archive.path}: {source}: found {len(files)} files and {len(labels)} labels")
    return list(zip(files, labels, strict=True))
