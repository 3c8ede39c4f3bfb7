"""All file output of the project: written aside and moved into place, so a file is whole or absent."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stages.core.runtime.errors import InputError, shown

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: beyond the size that the system lets a file have
CLOSED = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
FULL_DISK = "{}: no space left on the device; free some and run the same again"
HEADER = 1 << 25  # bytes of a safetensors file that describe its tensors


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it onto ``path`` if the block succeeds, remove it if not.

    What a killed process left in the folder is removed first. Raises InputError when the folder cannot be written or
    the disk is full.
    """
    path = as_path(path)
    temporary = handle = None
    try:
        with _told(path):
            _check_replaceable(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            temporary, handle = _temporary(path)
        try:
            yield temporary
        except OSError as error:
            if error.errno not in (*FULL, *CLOSED):
                raise  # of whatever the block reads
            with _told(path):
                raise
        with _told(path):
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system says of a path that cannot be written, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise InputError(FULL_DISK.format(path)) from error
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _check_replaceable(path: Path) -> None:
    """Gate: a file is moved onto ``path``, which a device, a pipe or a socket would not survive."""
    if path.is_dir():
        raise InputError(f"{path}: cannot be written (Is a directory)")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: cannot be written (no ordinary file); allowed: a file, or a new name")


def as_path(path: str | Path) -> Path:
    """What a user gives as one, ``~`` for the own folder. Raises InputError for anything else."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in str(path):
        raise InputError(f"path: found {shown(path)}; allowed: a text or a Path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # somebody whom the system does not know
        raise InputError(f"path: found {shown(path)}; allowed: the whole path ({error})") from error


def _existing(path: str | Path) -> Path:
    """The path of a file. Raises InputError where there is none."""
    path = as_path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file"
        raise InputError(f"{path}: found {kind}; allowed: a file")
    return path


def _temporary(path: Path) -> tuple[Path, int]:
    """A file beside ``path`` that this process holds locked: its lock says that it is not left over."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:200]}.", suffix=".tmp", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks, on which nothing is swept either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(name):  # not swept between its birth and its lock
            return Path(name), handle
        os.close(handle)


@cache
def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder``; once in a process."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by whoever still writes it
            path.unlink()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder but hidden ones, links followed, in any order.

    Raises InputError for what is neither a file nor a folder (a pipe would never end), for a link that leads nowhere
    and for one to a folder that contains it (which would never end either).
    """
    try:
        entries = [Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    for path in entries:
        if path.is_file():
            yield path
        elif not path.is_dir():
            raise InputError(f"{path}: neither a file nor a folder")
        elif folder.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path}: a link to a folder that contains it")
        else:
            yield from files_below(path)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with a final newline; key order is kept, NaN is refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV with a header line. ``rows`` must not be empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file. Tensors are made contiguous on the CPU; metadata values are strings."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # here, so that stages without tensors do not import torch

    plain, storages = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        # safetensors takes no tensor that shares its memory, with another or with the rest of its storage
        if storage.nbytes() != own.nbytes or storage.data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        plain[name] = own
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # tells the system's own errors by text alone
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises InputError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a safetensors file: (tensors by name, metadata). Raises InputError when missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise _no_safetensors(path, error) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """A safetensors file's own texts alone. Raises InputError when it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise _no_safetensors(path, error) from error


def _no_safetensors(path: Path, error: Exception) -> InputError:
    """What to say of a file that cannot be read as one, and what it is where its first bytes say so."""
    instead = "; found one of torch.save" if first_bytes(path, 2) == b"PK" else ""
    return InputError(f"{path}: not a whole safetensors file ({error}){instead}")


def first_bytes(path: Path, size: int) -> bytes:
    """How a file begins."""
    with open(path, "rb") as file:
        return file.read(size)


def _check_header(path: Path) -> None:
    """Its size against the file's and a bound: what it describes is built before a single tensor is read."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if size > HEADER and size <= path.stat().st_size:
        raise InputError(f"{path}: found a header of {size} bytes; allowed: up to {HEADER}")


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
