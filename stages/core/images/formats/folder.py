"""A folder of images: `train/<class>/*` and `test/<class>/*`, possibly below one top folder."""

from stages.core.images.archives import Archive
from stages.core.images.formats.listing import Listing
from stages.core.runtime.errors import InputError
from stages.core.settings.datasets import IMAGES, is_image, level_of_part


def read(archive: Archive) -> Listing:
    """Classes are sorted by name and the same in both splits; files that are not images are passed over.

    Raises InputError for any other folder.
    """
    found: dict[str, dict[str, list[str]]] = {}
    tops = set()
    for name in archive.names:
        levels, depth = name.split("/"), level_of_part(name)
        if depth is None or not is_image(name):
            continue
        if len(levels) < depth + 3:
            raise InputError(
                f"{archive.path}: image {name!r} is in no class folder; allowed: {levels[depth]}/<class>/..."
            )
        tops.add("/".join(levels[:depth]))
        found.setdefault(levels[depth], {}).setdefault(levels[depth + 1], []).append(name)
    _check(archive, found, tops)
    classes = tuple(sorted(found["train"]))
    train, test = (
        [(name, index) for index, c in enumerate(classes) for name in found[part][c]]
        for part in ("train", "test")
    )
    return Listing(classes, train, test)


def _check(archive: Archive, found: dict[str, dict[str, list[str]]], tops: set[str]) -> None:
    allowed = f"allowed: train/<class>/ and test/<class>/ with images ({' '.join(IMAGES)})"
    if not archive.names:
        raise InputError(f"{archive.path}: nothing in it; {allowed}")
    lost = [part for part in ("train", "test") if part not in found]
    if lost:
        raise InputError(
            f"{archive.path}: no images in {' or '.join(f'{part}/' for part in lost)}; {allowed}"
        )
    if len(tops) > 1:
        raise InputError(
            f"{archive.path}: train and test in several top folders ({sorted(tops)}); allowed: one"
        )
    train, test = set(found["train"]), set(found["test"])
    if train != test:
        raise InputError(
            f"{archive.path}: classes of train and test differ: only in train {sorted(train - test)[:3]}, "
            f"only in test {sorted(test - train)[:3]}; allowed: the same classes in both"
        )
    if len(train) < 2:
        raise InputError(f"{archive.path}: found the one class {next(iter(train))!r}; allowed: two or more")
