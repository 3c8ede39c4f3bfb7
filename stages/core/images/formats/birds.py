"""CUB-200-2011 and NABirds: images.txt, image_class_labels.txt, train_test_split.txt and classes.txt over `images/`."""

from collections import Counter

from stages.core.images.archives import Archive
from stages.core.images.formats.listing import Listing, check_present, folder_of, table, whole_number
from stages.core.runtime.errors import InputError

_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def read(archive: Archive, title: str) -> Listing:
    """The classes that have images (in NABirds the leaves of its tree), in the order of their numbers.

    Where two classes have the same name, each is followed by its number. Raises InputError.
    """
    top = folder_of(archive, _LISTS[0], title)
    for name in _LISTS:
        if top + name not in archive:
            raise InputError(f"{archive.path}: no {top}{name} in it; the whole data set: {title}")
    files, labels, in_train, titles = (dict(table(archive, top + name, 2)) for name in _LISTS)
    for name, found in zip(_LISTS[1:3], (labels, in_train), strict=True):
        if found.keys() != files.keys():
            raise InputError(f"{archive.path}: {top}{name}: lists other images than images.txt; {title}")
    numbers = {whole_number(archive, top + _LISTS[1], label): label for label in set(labels.values())}
    used = [numbers[number] for number in sorted(numbers)]
    if unnamed := [label for label in used if label not in titles]:
        raise InputError(
            f"{archive.path}: {top}classes.txt: no class {unnamed[0]}; the whole data set: {title}"
        )
    again = Counter(titles[label] for label in used)
    classes = tuple(titles[n] if again[titles[n]] == 1 else f"{titles[n]} ({n})" for n in used)
    check_present(archive, (f"{top}images/{file}" for file in files.values()), f"{top}images.txt", title)
    index = {label: position for position, label in enumerate(used)}
    train, test = (
        [(f"{top}images/{files[i]}", index[labels[i]]) for i in files if (in_train[i] == "1") == wanted]
        for wanted in (True, False)
    )
    return Listing(classes, train, test, numbers=tuple(number - 1 for number in sorted(numbers)))
