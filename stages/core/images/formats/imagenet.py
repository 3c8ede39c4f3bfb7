"""ImageNet (ILSVRC 2012), in any of its layouts: `train/<wnid>/*.JPEG`, the tar of tars, or only `val`.

Made for use as a proxy, where labels do not matter. With train images there, val (if in class folders) is the
test split; without, val takes the place of train.
"""

import re

from stages.core.images.archives import Archive
from stages.core.images.formats.listing import Listing, missing
from stages.core.settings.datasets import is_image

_WNID = re.compile(r"n\d{8}")


def read(archive: Archive, title: str) -> Listing:
    """Classes are the WordNet numbers, sorted; validation images without class folders are unlabelled.

    Raises InputError where there are no images.
    """
    train: list[tuple[str, str | None]] = []
    val: list[tuple[str, str | None]] = []
    for name in archive.names:
        *folders, file = name.split("/")
        if not is_image(name) or "_test_" in file or "test" in folders:
            continue
        # The official tar of one class has no folder, but the class is in the file name.
        named = _WNID.fullmatch(folders[-1]) if folders else None
        wnid = named or _WNID.match(file)
        if "_val_" in file or "val" in folders:
            val.append((name, wnid[0] if wnid else None))
        elif wnid:
            train.append((name, wnid[0]))
    if not train and not val:
        raise missing(archive, "train/<wnid>/*.JPEG or val/*.JPEG", title)
    if not train:
        train, val = val, []
    if any(wnid is None for _, wnid in train):
        return Listing(("unknown",), [(name, 0) for name, _ in train], [], labelled=False)
    classes = tuple(sorted({wnid for _, wnid in train}))
    index = {wnid: position for position, wnid in enumerate(classes)}
    known = [(name, index[wnid]) for name, wnid in val if wnid in index]
    return Listing(classes, [(name, index[wnid]) for name, wnid in train], known)
