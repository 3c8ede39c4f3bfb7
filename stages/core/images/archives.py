"""Zip and tar files read as one tree of names, without unpacking them.

Nothing is ever written by name, so no entry can land outside a folder; entries and links that would are refused
all the same, because a data set that has them is not what it seems. An archive inside an archive stands for its
content, in the folder where it lies. Only gzip is undone on disk, into a file of the cache: it has no random access.
"""

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

from tqdm import tqdm

from stages.core.images.windows import Window, Zip
from stages.core.runtime.cache import identity, kept_file
from stages.core.runtime.errors import InputError

Container = Window | Zip
Where = tuple[int, int] | zipfile.ZipInfo  # what a source knows an entry by
Digest = Callable[[], str]  # names the content, for the cache; computed only where it is needed

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_BLOCK = tarfile.BLOCKSIZE
_DEEPEST = 8  # archives inside archives, gzip counted on its own
_PIECE = 1 << 22  # bytes


class Archive:
    """The files of one or several archives. ``names``: all of them, sorted, `/` between folders.

    A file that is no archive is in the tree by its own name. Hidden entries and those of macOS are left out.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises InputError for a damaged archive, and for entries or links that leave its folder."""
        self.path = paths[0]
        self._files: list[io.FileIO] = []
        self._members: dict[str, tuple[Container, Where]] = {}
        self._links: dict[str, str] = {}
        try:
            for path in paths:
                self._open(path, path.name)
            self._resolve()
        except BaseException:
            self.close()
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
        try:
            return source.content(where)
        # zipfile knows no common exception for damaged, encrypted and unknown compression.
        except (
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            NotImplementedError,
            EOFError,
            OSError,
        ) as error:
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
            plain = kept_file(f"{digest()}.tar", lambda target: self._gunzip(window, target, name))
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
                path = kept_file(
                    f"{digest()}.member", lambda target: target.write_bytes(source.content(where))
                )
                self._open(path, posixpath.basename(name), posixpath.dirname(name), depth + 1)
                return
            if self._mount(window, posixpath.dirname(name), name, depth + 1, digest):
                return
        self._members[name] = (source, where)

    def _zip_entries(self, window: Window, folder: str, name: str) -> Iterator[tuple[str, Container, Where]]:
        try:
            source = Zip(window)
        except (zipfile.BadZipFile, OSError) as error:
            self._damaged(name, "zip", error)
        for info in source.file.infolist():
            if info.flag_bits & 1:
                raise InputError(f"{self.path}: {info.filename!r} is encrypted; allowed: a plain zip file")
            if stat.S_ISLNK(info.external_attr >> 16):
                target = source.content(info).decode("utf-8", "replace")
                self._link(folder, info.filename, target, relative=True)
            elif info.is_dir():
                self._inside(info.filename)
            else:
                yield info.filename, source, info

    def _tar_entries(self, window: Window, folder: str, name: str) -> Iterator[tuple[str, Container, Where]]:
        try:
            with tarfile.open(fileobj=io.BufferedReader(window), mode="r:") as file:
                members = file.getmembers()
        except (tarfile.TarError, OSError, EOFError) as error:
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
        bar = tqdm(
            total=window.size, unit="B", unit_scale=True, desc=f"unpacking {name}", delay=3, leave=False
        )
        try:
            with bar, gzip.open(io.BufferedReader(window)) as source, open(target, "wb") as out:
                while piece := source.read(_PIECE):
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
            target, seen = name, set()
            while target in self._links and target not in seen:
                seen.add(target)
                target = self._links[target]
            if target in self._members:
                self._members[name] = self._members[target]

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


def _slug(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
