"""Files of torch.save, read as data: nothing in them is run, and nothing is taken for whole that is not."""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import first_bytes

MOST_ENTRIES = 20_000  # tensors and notes of one file
PICKLE = 1 << 26  # bytes of what describes the tensors
ALLOWED = "allowed: a file as torch.save(network.state_dict(), ...) writes it"


class _Number:
    """Stands for NumPy's scalars, arrays and dtypes, and for paths, which scripts keep beside weights: left unread.

    NumPy itself is not called: the state of a dtype from a file could make it read memory it must not.
    """

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_IGNORED = [
    (_Number, name)
    for name in (
        *(f"pathlib.{kind}{name}" for kind in ("", "Pure") for name in ("Path", "PosixPath", "WindowsPath")),
        *("numpy.ndarray", "numpy.dtype", "numpy.random._pickle.__randomstate_ctor"),
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("scalar", "_reconstruct")
        ),
    )
]


def read_torch(path: Path) -> Any:
    """What torch.save wrote: tensors on the CPU in plain containers; NumPy's values are left out.

    Raises InputError when reading would run code, and for a damaged file: those of PyTorch 1.6 and later carry a
    checksum of every tensor.
    """
    try:
        if first_bytes(path, 2) == b"PK":
            _check_zip(path)
        # Training scripts (torchvision's among them) save their arguments beside the weights; a Namespace is only data.
        with (
            warnings.catch_warnings(action="ignore"),
            safe_globals([argparse.Namespace, *_IGNORED]),
            path.open("rb") as file,  # by its name torch takes a file for another format
        ):
            return torch.load(file, weights_only=True, map_location="cpu")
    except InputError:
        raise
    # A damaged file raises nearly anything, by where the damage is.
    except Exception as error:
        if (other := _what_else(path)) is not None:
            raise InputError(f"{path}: not a checkpoint but {other}; allowed: a whole file") from error
        if isinstance(error, pickle.UnpicklingError) and "magic number" not in str(error).lower():
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named is None and re.fullmatch(rb"[\t\n\r -~]+[ \n][\t\n\r -~]*", first_bytes(path, 64)):
                raise InputError(f"{path}: not a checkpoint but a text; {ALLOWED}") from error
            what = f"{named[1]}, which could run code" if named else "pickled objects, which could run code"
            raise InputError(f"{path}: refused: it holds more than tensors ({what}); {ALLOWED}") from error
        raise InputError(
            f"{path}: damaged or not a checkpoint ({_first_sentence(error)}); allowed: a whole file"
        ) from error


def _check_zip(path: Path) -> None:
    """The checksums and sizes of a zip file. torch reads its tensors without a look at either.

    Raises InputError, and what zipfile raises for damage.
    """
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        names = {info.filename for info in entries}
        if any(name.endswith("/constants.pkl") for name in names):
            raise InputError(f"{path}: refused: a TorchScript file, which holds code; {ALLOWED}")
        if len(entries) > MOST_ENTRIES or len(names) != len(entries):
            raise InputError(
                f"{path}: found {len(entries)} entries of {len(names)} names; allowed: one each, up to {MOST_ENTRIES}"
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries):
            raise InputError(f"{path}: found compressed entries; {ALLOWED}, which compresses nothing")
        described = max(
            (info.file_size for info in entries if info.filename.endswith("/data.pkl")), default=0
        )
        if described > PICKLE or sum(info.file_size for info in entries) > path.stat().st_size:
            raise InputError(f"{path}: found sizes that the file cannot hold; allowed: a whole file")
        if (broken := file.testzip()) is not None:
            raise InputError(f"{path}: damaged: the checksum of {broken} differs; allowed: a whole file")


def _what_else(path: Path) -> str | None:
    """What often bears the name of a checkpoint without being one, by how it begins."""
    head = first_bytes(path, 64).lstrip()
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (git lfs pull brings the file)"
    return "a web page (the download was refused)" if head[:1] == b"<" else None


def _first_sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
