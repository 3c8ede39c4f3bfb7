"""Which images of a data set belong to a split, and how their classes are numbered."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from stages.core.images.formats.listing import Entries, Listing
from stages.core.runtime.device import generator
from stages.core.runtime.errors import InputError, some
from stages.core.settings.profiles import Data

Split = Literal["train", "calibration", "test"]
SPLIT_SEED = 20160627  # of every split and order; fixed, see the module docstring


def choose(path: Path, data: Data, split: Split, listing: Listing) -> tuple[Entries, tuple[str, ...]]:
    """The entries of a split in their fixed random order, labelled by the classes that are returned with them.

    Raises InputError for a data set with two classes of one name, which would become one.
    """
    if twice := [name for name, count in Counter(listing.classes).items() if count > 1]:
        raise InputError(f"{path}: found {some(twice)} as the name of two classes; allowed: a name for each")
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
    order = torch.randperm(len(members), generator=generator(SPLIT_SEED, len(members))).tolist()
    return [members[i] for i in order], classes


def _share(images: Sequence[str], share: float, position: int, split: Split) -> list[str]:
    """The calibration share of one class's train images, or the rest of them."""
    order = torch.randperm(len(images), generator=generator(SPLIT_SEED, position)).tolist()
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
            raise InputError(f"{path}: data.classes: found {name!r}; allowed: {some(found)}")
    return tuple(dict.fromkeys(wanted or found))
