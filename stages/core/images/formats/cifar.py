"""CIFAR-10 and CIFAR-100 in their python version: pickled arrays, read without running code from them.

The same images as a folder (`train/<class>/*.png`) will do too. Krizhevsky 2009, Learning Multiple Layers of
Features from Tiny Images.
"""

import io
import pickle
from typing import TYPE_CHECKING, Any

from stages.core.images.archives import Archive
from stages.core.images.formats import folder
from stages.core.images.formats.listing import Entries, Listing, folder_of
from stages.core.runtime.errors import InputError
from stages.core.settings.datasets import is_image

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIDE = 32
_TEN = ("batches.meta", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], b"labels", b"label_names")
_HUNDRED = ("meta", ["train"], ["test"], b"fine_labels", b"fine_label_names")


def read_ten(archive: Archive, title: str) -> Listing:
    """`cifar-10-python.tar.gz`, or its images as a folder. Raises InputError for anything else."""
    return _read(archive, title, *_TEN)


def read_hundred(archive: Archive, title: str) -> Listing:
    """`cifar-100-python.tar.gz` with its 100 fine labels, or its images as a folder. Raises InputError."""
    return _read(archive, title, *_HUNDRED)


def _read(
    archive: Archive, title: str, meta: str, train: list[str], test: list[str], labels: bytes, names: bytes
):
    if any(is_image(name) for name in archive.names):
        return folder.read(archive)
    top = folder_of(archive, meta, title)
    for batch in [*train, *test]:
        if top + batch not in archive:
            raise InputError(f"{archive.path}: no {top}{batch} in it; the whole data set: {title}")
    found = _load(archive, top + meta).get(names)
    if not isinstance(found, list) or not all(isinstance(name, bytes) for name in found):
        raise InputError(f"{archive.path}: {top}{meta}: found no list {names.decode()}; allowed: {title}")
    classes = tuple(name.decode("utf-8", "replace") for name in found)
    arrays: dict[str, np.ndarray] = {}
    splits = [_entries(archive, top, part, labels, len(classes), arrays) for part in (train, test)]

    def image(name: str) -> "Image":
        from PIL import Image

        batch, row = name.split("#")
        return Image.fromarray(arrays[batch][int(row)].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))

    return Listing(classes, *splits, image)


def _entries(
    archive: Archive,
    top: str,
    batches: list[str],
    labels: bytes,
    classes: int,
    arrays: "dict[str, np.ndarray]",
) -> Entries:
    """The rows of some batches as `<batch>#<row>`; their pixels go into ``arrays``, uint8 (n, 3072)."""
    import numpy as np

    entries: Entries = []
    for batch in batches:
        found = _load(archive, top + batch)
        data, known = found.get(b"data"), found.get(labels)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * _SIDE**2,):
            raise InputError(f"{archive.path}: {top}{batch}: allowed: uint8 data of {3 * _SIDE**2} columns")
        if not isinstance(known, list) or len(known) != len(data) or not set(known) <= set(range(classes)):
            raise InputError(
                f"{archive.path}: {top}{batch}: allowed: {labels.decode()} from 0 to {classes - 1}, one a row"
            )
        arrays[batch] = data
        entries += [(f"{batch}#{row:05}", label) for row, label in enumerate(known)]
    return entries


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays and plain Python values; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return known[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """What protocol 2 of Python 3 writes for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it names the encoding {encoding}")
    return text.encode("latin1")


def _load(archive: Archive, name: str) -> dict[bytes, Any]:
    content = archive.read(name)
    try:
        found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    # A damaged pickle raises nearly anything, by where the damage is.
    except Exception as error:
        raise InputError(
            f"{archive.path}: {name}: refused or damaged ({error}); allowed: a pickle of arrays, lists and texts"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{archive.path}: {name}: found a {type(found).__name__}; allowed: a dict")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
