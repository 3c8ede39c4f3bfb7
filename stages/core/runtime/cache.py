"""What is kept between runs outside the workspace. All of it can be deleted at any time: it is made again.

<user's cache>/pleas-merging/hashes     SHA-256 of files of the workspace, by path, size and time
                            /unpacked   tar files without their gzip, until they are unused for 30 days
                            /values     what a sweep keeps on disk; the files have no names (stages.core.sweep.values)
                            /decoded    images as arrays (stages.core.images.kept)
                            /<bucket>   downloads (stages.artifacts.bucket)
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import replacing, write_text
from stages.core.runtime.progress import Bar

Storage = Literal[
    "memory", "disk", "auto"
]  # where the values of all images are; auto: in memory where they fit

UNUSED = 30 * 24 * 3600  # seconds after which an unpacked file goes
SETTLED = 2.0  # seconds; clocks of file systems are coarser than two writes are apart

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`pleas-merging` in the user's cache folder; the variable XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pleas-merging"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Hold ``folder`` against other processes; the lock goes with the process, however that ends.

    A folder that is there but cannot be written needs no lock: it can be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM) or not folder.is_dir():
            raise
        yield folder
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is filling it; waiting", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder


def identity(path: Path) -> str:
    """SHA-256 of a file's content, computed once for each version of the file.

    The time of the last change of its inode is a part of a version: every write moves it, and nobody can set it back.
    A file that changed just now is read anew the next time, since a second write could bear the same time.
    """
    found = path.stat()
    seen = "\n".join(
        [str(path.resolve())]
        + [str(n) for n in (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)]
    )
    note = cache_folder() / "hashes" / hashlib.sha256(seen.encode()).hexdigest()
    with contextlib.suppress(OSError):
        if len(known := note.read_text()) == 64:
            return known
    digest = _sha256(path)
    if time.time() - found.st_ctime > SETTLED and path.stat().st_ctime_ns == found.st_ctime_ns:
        with contextlib.suppress(OSError, InputError):  # a cache that cannot be written costs time only
            write_text(note, digest)
    return digest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = Bar(total=size, unit="B", unit_scale=True, desc=f"hashing {path.name}")
    with bar, open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def kept_file(name: str, write: Callable[[Path], None]) -> Path:
    """The file ``unpacked/<name>`` of the cache, made by ``write`` (into the path it is given) if it is not there.

    When one is made, those that no one has used for a month are removed.
    Raises InputError when the cache folder cannot be written or its disk is full.
    """
    path = cache_folder() / "unpacked" / name
    try:
        if not path.is_file():
            with alone(path.with_name(f"{name}.making")):
                if not path.is_file():
                    _remove_unused(path.parent)
                    with replacing(path) as temporary:
                        write(temporary)
        with contextlib.suppress(OSError):
            os.utime(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise InputError(
            f"{path.parent}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    return path


def _remove_unused(folder: Path) -> None:
    """Remove the files that have not been used for ``UNUSED`` seconds."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_mtime < time.time() - UNUSED:
                path.unlink()
