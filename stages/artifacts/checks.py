"""Whether a download is what the server says it holds: by md5, by checksum, or by the md5 of each part."""

import base64
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 1 << 20  # bytes read at a time
MIB = 1 << 20
USUAL = [n * MIB for n in (5, 8, 16, 10, 15, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)]  # sizes of parts


@dataclass(frozen=True)
class Version:
    """One state of an object: its ETag (with quotes) and its bytes, and what can be checked of them.

    md5: where the ETag is one. parts: how many the ETag is made of, md5(md5 of each part)-parts; None: it is not.
    sums: base64 checksums of the whole object by algorithm (crc32, sha1, sha256), where the server gives some.
    """

    etag: str
    size: int
    md5: str | None
    parts: int | None
    sums: tuple[tuple[str, str], ...]


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, content: bytes) -> None:
        self._value = zlib.crc32(content, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


SUMS: dict[str, Callable[[], Any]] = {
    "md5": _md5,
    "crc32": _Crc32,
    "sha1": hashlib.sha1,
    "sha256": hashlib.sha256,
}


def difference(path: Path, version: Version, part_sizes: Callable[[bool], list[int] | None]) -> str | None:
    """What differs between the file and the server's word of it; None where nothing does, "" where there is no word.

    part_sizes(all): sizes of the object's parts, by the first of them or asked for one by one; None: not told.
    """
    size = path.stat().st_size
    if size != version.size:
        return f"{size} bytes instead of {version.size}"
    whole = (("md5", version.md5),) if version.md5 else version.sums
    for name, told in whole:
        with open(path, "rb") as file:
            digest = _digest(file, size, SUMS[name]())
        found = digest.hex() if name == "md5" else base64.b64encode(digest).decode()
        if found != told:
            return f"{name} {found} instead of {told}"
    if whole:
        return None
    if version.parts:
        told = [sizes for every in (False, True) if (sizes := part_sizes(every))]
        guesses = told or _guesses(size, version.parts)
        if any(etag_of_parts(path, sizes) == version.etag.strip('"') for sizes in guesses):
            return None
        if told:
            return "the md5 of its parts is another"
    return ""


def etag_of_parts(path: Path, sizes: Sequence[int]) -> str:
    """The ETag of an object that was uploaded in parts of these sizes."""
    with open(path, "rb") as file:
        digests = b"".join(_digest(file, size, _md5()) for size in sizes)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(sizes)}"


def equal_parts(size: int, part: int, count: int) -> list[int] | None:
    """``count`` sizes that are ``part``, but for a smaller last one; None where these do not make ``size``."""
    rest = size - part * (count - 1)
    return [part] * (count - 1) + [rest] if 0 < rest <= part else None


def _guesses(size: int, count: int) -> list[list[int]]:
    """Sizes of parts that uploading programs choose, as far as they make ``count`` parts."""
    least = -(-size // count // MIB) * MIB or MIB
    return [
        sizes for part in dict.fromkeys([*USUAL, least, size]) if (sizes := equal_parts(size, part, count))
    ]


def _digest(file: BinaryIO, size: int, digest: Any) -> bytes:
    while size and (piece := file.read(min(size, PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()
