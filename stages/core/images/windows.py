"""Arrangement of one open file read as files of their own, from several threads at once."""

import contextlib
import io
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_TAIL = (1 << 16) + 22 + 20 + 56  # bytes: the longest comment, and the three records at the end of a zip file


class Window(io.RawIOBase):
    """A part of an open file, as a file of its own. Positioned reads: threads do not disturb each other."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._start, self.size, self._at = descriptor, start, size, 0

    def content(self, where: tuple[int, int]) -> bytes:
        """(offset, size) -> bytes; fewer than ``size`` raise EOFError."""
        offset, size = where
        pieces = []
        while size:
            piece = os.pread(self._descriptor, min(size, 1 << 30), self._start + offset)
            if not piece:
                raise EOFError("the file ends early")
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def window(self, where: tuple[int, int]) -> "Window":
        return Window(self._descriptor, self._start + where[0], where[1])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        size = max(0, min(len(buffer), self.size - self._at))
        content = os.pread(self._descriptor, size, self._start + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class Zip:
    """A zip file; decompression runs in the reading thread, only the file's shared state is locked."""

    def __init__(self, window: Window) -> None:
        self._window, self._lock = window, threading.Lock()
        self.file = zipfile.ZipFile(io.BufferedReader(window))

    def content(self, where: zipfile.ZipInfo) -> bytes:
        with self._opened(where) as member:
            return member.read()

    def copy(self, where: zipfile.ZipInfo, target: Path) -> None:
        """Write an entry's content to ``target``, a piece at a time."""
        with self._opened(where) as member, open(target, "wb") as out:
            shutil.copyfileobj(member, out, 1 << 22)

    @contextlib.contextmanager
    def _opened(self, where: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
        with self._lock:
            member = self.file.open(where)
        try:
            yield member
        finally:
            with self._lock:
                member.close()

    def counted(self) -> int:
        """How many entries the file says it has. zipfile does not look: one damaged length swallows all that follow."""
        size = min(self._window.size, _TAIL)
        tail = self._window.content((self._window.size - size, size))
        at = tail.rfind(b"PK\x05\x06")
        count = int.from_bytes(tail[at + 10 : at + 12], "little")
        if (
            tail[at - 20 : at - 16] == b"PK\x06\x07"
        ):  # zip64: the count of 8 bytes is in the record before that
            count = int.from_bytes(tail[at - 44 : at - 36], "little")
        return count

    def check_name(self, where: zipfile.ZipInfo) -> None:
        """The name of an entry in the list at the file's end is that at its content, or BadZipFile.

        zipfile compares them when an entry is read; one damaged name can hide an entry, which is never read then.
        """
        header = self._window.content((where.header_offset, zipfile.sizeFileHeader))
        length, flags = int.from_bytes(header[26:28], "little"), int.from_bytes(header[6:8], "little")
        name = self._window.content((where.header_offset + zipfile.sizeFileHeader, length))
        if name.decode("utf-8" if flags & 0x800 else "cp437", "replace") != where.orig_filename:
            raise zipfile.BadZipFile(f"{where.orig_filename!r} has two names")

    def window(self, where: zipfile.ZipInfo) -> Window | None:
        """The bytes of an entry that is stored as it is; None for a compressed one."""
        if where.compress_type != zipfile.ZIP_STORED:
            return None
        header = self._window.content((where.header_offset, zipfile.sizeFileHeader))
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return self._window.window((where.header_offset + zipfile.sizeFileHeader + names, where.file_size))
