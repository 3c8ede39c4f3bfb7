"""Zip and tar files read as one tree of names, without unpacking them.

Nothing is ever written by name, so no entry can land outside a folder; entries and links that would are refused
all the same, because a data set that has them is not what it seems. An archive inside an archive stands for its
content, in the folder where it lies. Only gzip is undone on disk, into a file of the cache: it has no random access.
What all of it may cost is bounded while it is read (``Allowance``); what a refused archive left in the cache goes.
"""

import contextlib
import gzip
import hashlib
import io
import os
import posixpath
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn, Self

from stages.core.images.allowance import Allowance
from stages.core.images.windows import Window, Zip
from stages.core.runtime.cache import identity, kept_file
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import FULL
from stages.core.runtime.progress import Bar
from stages.core.settings.profiles import Limits

Container = Window | Zip
Where = tuple[int, int] | zipfile.ZipInfo  # what a source knows an entry by
Digest = Callable[[], str]  # names the content, for the cache; computed only where it is needed

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_BLOCK = tarfile.BLOCKSIZE
_DEEPEST = 8  # archives inside archives, gzip counted on its own
_PIECE = 1 << 22  # bytes
_LONGEST = 4096  # bytes of a link's target: PATH_MAX


class Archive:
    """The files of one or several archives. ``names``: all of them, sorted, `/` between folders.

    A file that is no archive is in the tree by its own name. Hidden entries and those of macOS are left out.
    """

    def __init__(self, paths: Sequence[Path], limits: Limits = Limits()) -> None:  # noqa: B008 (frozen)
        """Raises InputError for a damaged archive, entries or links that leave its folder, and beyond ``limits``."""
        self.path = paths[0]
        self._allowance = Allowance(str(self.path), sum(path.stat().st_size for path in paths), limits)
        self._files: list[io.FileIO] = []
        self._unpacked: list[Path] = []  # in the cache
        self._members: dict[str, tuple[Container, Where]] = {}
        self._links: dict[str, str] = {}
        try:
            for path in paths:
                self._open(path, path.name)
            self._resolve()
        except BaseException as error:
            self.close()
            if isinstance(error, InputError):  # of no use to anyone
                for path in self._unpacked:
                    path.unlink(missing_ok=True)
            raise
        self.names = sorted(self._members)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self, name: str) -> bytes:
        """A file's content; from several threads at once. Raises InputError when it is not there or damaged."""
        if name not in self._members:
            raise InputError(f"{self.path}: no {name} in it")
        source, where = self._members[name]
        with self._reading(name):
            return source.content(where)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        # zipfile knows no common exception for damaged, encrypted and unknown compression.
        except (
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            NotImplementedError,
            EOFError,
            OSError,
        ) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            raise InputError(f"{self.path}: {name}: cannot be read ({error})") from error

    def _open(self, path: Path, name: str, folder: str = "", depth: int = 0) -> None:
        file = io.FileIO(path)
        self._files.append(file)
        window = Window(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        if not self._mount(window, folder, name, depth, lambda: identity(path)):
            if name.lower().endswith(SUFFIXES):
                where = f"{self.path}" if name == self.path.name else f"{self.path}: {name}"
                raise InputError(f"{where}: not a whole zip or tar file")
            self._members[posixpath.join(folder, name)] = (window, (0, window.size))

    def _mount(self, window: Window, folder: str, name: str, depth: int, digest: Digest) -> bool:
        """Take in the archive that ``window`` shows; False where it is none."""
        if depth > _DEEPEST:
            raise InputError(f"{self.path}: {name}: more than {_DEEPEST} archives inside each other")
        head = window.content((0, min(window.size, _BLOCK)))
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            entries = self._zip_entries(window, folder, name)
        elif head.startswith(b"\x1f\x8b"):
            plain = self._kept(f"{digest()}.tar", lambda target: self._gunzip(window, target, name))
            self._open(plain, name, folder, depth + 1)
            return True
        elif _is_tar(head):
            entries = self._tar_entries(window, folder, name)
        else:
            return False
        for entry, source, where in entries:
            self._add(folder, entry, source, where, depth, lambda entry=entry: f"{digest()}-{_slug(entry)}")
        return True

    def _add(
        self, folder: str, entry: str, source: Container, where: Where, depth: int, digest: Digest
    ) -> None:
        name = posixpath.join(folder, self._inside(entry))
        if any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts):
            return
        if name.lower().endswith(SUFFIXES):
            window = source.window(where)
            if window is None:  # compressed in its archive: brought to the cache as it is
                with self._reading(name):
                    path = self._kept(f"{digest()}.member", lambda target: source.copy(where, target))
                self._open(path, posixpath.basename(name), posixpath.dirname(name), depth + 1)
                return
            if self._mount(window, posixpath.dirname(name), name, depth + 1, digest):
                return
        self._members[name] = (source, where)

    def _kept(self, name: str, write: Callable[[Path], None]) -> Path:
        path = kept_file(name, write)
        self._unpacked.append(path)
        return path

    def _zip_entries(self, window: Window, folder: str, name: str) -> Iterator[tuple[str, Container, Where]]:
        try:
            source = Zip(window)
            entries = source.file.infolist()
            self._allowance.enter(len(entries))
            self._allowance.stored(name, sum(info.compress_size for info in entries), window.size)
            self._allowance.unpack(sum(info.file_size for info in entries))
            if (counted := source.counted()) != len(entries):
                raise zipfile.BadZipFile(f"{len(entries)} entries instead of {counted}")
            for info in entries:
                source.check_name(info)
        # zipfile raises ValueError and NotImplementedError too, by where the damage is.
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            self._damaged(name, "zip", error)
        for info in entries:
            if info.flag_bits & 1:
                raise InputError(f"{self.path}: {info.filename!r} is encrypted; allowed: a plain zip file")
            if stat.S_ISLNK(info.external_attr >> 16):
                if info.file_size > _LONGEST:
                    raise InputError(
                        f"{self.path}: link {info.filename!r} to {info.file_size} bytes; allowed: {_LONGEST}"
                    )
                with self._reading(info.filename):
                    target = source.content(info).decode("utf-8", "replace")
                self._link(folder, info.filename, target, relative=True)
            elif info.is_dir():
                self._inside(info.filename)
            else:
                yield info.filename, source, info

    def _tar_entries(self, window: Window, folder: str, name: str) -> Iterator[tuple[str, Container, Where]]:
        try:
            with tarfile.open(fileobj=io.BufferedReader(window), mode="r:") as file:
                members = []
                for info in file:
                    self._allowance.enter(1)
                    members.append(info)
                end = file.offset
            _check_end(window, end)
        # tarfile knows no common exception either: numbers and texts of a damaged header raise ValueError.
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            self._damaged(name, "tar", error)
        for info in members:
            if info.issym() or info.islnk():
                self._link(folder, info.name, info.linkname, relative=info.issym())
            elif info.isreg() and not info.issparse():
                if info.offset_data + info.size > window.size:
                    self._damaged(name, "tar", EOFError(f"{info.name} ends early"))
                yield info.name, window, (info.offset_data, info.size)
            else:
                self._inside(info.name)

    def _gunzip(self, window: Window, target: Path, name: str) -> None:
        window.seek(0)
        bar = Bar(total=window.size, unit="B", unit_scale=True, desc=f"unpacking {name}")
        try:
            with bar, gzip.open(io.BufferedReader(window)) as source, open(target, "wb") as out:
                while piece := source.read(_PIECE):
                    self._allowance.unpack(len(piece))
                    if shutil.disk_usage(target.parent).free < 2 * _PIECE:
                        raise InputError(f"{target.parent}: no space left to unpack {self.path}; free some")
                    out.write(piece)
                    bar.update(window.tell() - bar.n)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            self._damaged(name, "gzip", error)

    def _link(self, folder: str, name: str, target: str, relative: bool) -> None:
        start = posixpath.dirname(self._inside(name)) if relative else ""
        inside = self._inside(posixpath.join(start, target), f"link {name!r} to {target!r}")
        self._links[posixpath.join(folder, self._inside(name))] = posixpath.join(folder, inside)

    def _resolve(self) -> None:
        """Give linked files the content of what they point to; links to nothing, or to folders, drop out."""
        for name in self._links:
            target, seen = name, {}
            while target in self._links and target not in seen:
                seen[target] = True
                target = self._links[target]
            for passed in seen:  # each link is followed once, however long the chain
                if target in self._members:
                    self._members[passed] = self._members[target]
                self._links[passed] = target

    def _inside(self, entry: str, what: str = "") -> str:
        name = posixpath.normpath(entry)
        if entry.startswith("/") or "\\" in entry or "\0" in entry or name.split("/")[0] == "..":
            raise InputError(
                f"{self.path}: {what or f'entry {entry!r}'} leaves the folder; allowed: names inside it"
            )
        if ".." in PurePosixPath(entry).parts and not what:
            raise InputError(f"{self.path}: entry {entry!r} leaves the folder; allowed: names without '..'")
        return name

    def _damaged(self, name: str, kind: str, error: BaseException) -> NoReturn:
        where = f"{self.path}" if name == self.path.name else f"{self.path}: {name}"
        raise InputError(f"{where}: not a whole {kind} file ({error})") from error


def _is_tar(head: bytes) -> bool:
    """By the check sum of the first header, which the oldest tar files have too; also an empty tar file."""
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.EOFHeaderError:
        return len(head) == _BLOCK
    except tarfile.HeaderError:
        return False
    return True


def _check_end(window: Window, end: int) -> None:
    """A tar file ends with two blocks of zeros, of which one is required, and holds nothing after them.

    Without, it was cut at the edge of a member or has a damaged header, where tarfile stops without a word.
    """
    if len(block := window.content((end, max(0, min(_BLOCK, window.size - end))))) < _BLOCK:
        raise EOFError("it ends without an end block")
    if any(block):
        raise ValueError(f"damaged header at byte {end}")
    while end < window.size:
        size = min(_PIECE, window.size - end)
        if any(window.content((end, size)).strip(b"\0")):
            raise ValueError(f"content after its end, at byte {end}")
        end += size


def _slug(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
