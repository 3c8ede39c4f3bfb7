"""One domain of DomainNet: `<domain>/<class>/*` with the official lists <domain>_train.txt and <domain>_test.txt."""

import posixpath

from stages.core.images.archives import Archive
from stages.core.images.formats.listing import Entries, Listing, check_present, folder_of, table, whole_number
from stages.core.runtime.errors import InputError


def read(archive: Archive, domain: str, title: str) -> Listing:
    """Classes in the order of the lists' numbers, named as the folders. Raises InputError."""
    names: dict[int, str] = {}
    splits: list[Entries] = []
    for part in ("train", "test"):
        source = f"{domain}_{part}.txt"
        source = folder_of(archive, source, title) + source
        rows = []
        for file, number in table(archive, source, 2):  # clipart/zebra/clipart_344_000001.jpg 344
            label = whole_number(archive, source, number)
            name = posixpath.basename(posixpath.dirname(file))
            if names.setdefault(label, name) != name:
                raise InputError(f"{archive.path}: {source}: class {label} is both {names[label]} and {name}")
            rows.append((file, label))
        splits.append(rows)
    images = folder_of(archive, f"{domain}/", title)
    index = {label: position for position, label in enumerate(sorted(names))}
    train, test = ([(images + file, index[label]) for file, label in rows] for rows in splits)
    check_present(archive, (name for name, _ in [*train, *test]), f"{domain}_*.txt", title)
    return Listing(tuple(names[label] for label in sorted(names)), train, test)
