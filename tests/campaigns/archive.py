"""Archives: damaged, and written to leave their folder, to unfold, or to go in circles.

Good: refused in one line, or the files that were packed (of a plain tar, whose format has no checksums: their names);
no name leaves the folder, and nothing is written beside the cache.
"""

import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import miniatures

from stages.core.images.archives import Archive
from tests.campaigns.rule import Bad, damaged, held

FILES = {"a.txt": b"one", "b/c.txt": b"two" * 1000, "b/d/e.bin": bytes(range(256)) * 40, "empty": b""}
STRANGE = (
    "../x", "/x", "b/../../x", "a.txt", "b", "b/c.txt/d", "\\x", "C:\\x", "x" * 5000, "", ".", "é", "a\nb", "b//c.txt",
)  # fmt: skip
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    kind = draw.choice(["zip", "stored", "tar", "tgz", "links", "unfolds", "nested"])
    path = folder / "case"
    if kind in ("zip", "stored", "tar", "tgz"):
        path.write_bytes(damaged(draw, miniatures.packed(FILES, kind)))
    else:
        path.write_bytes({"links": _links, "unfolds": _unfolds, "nested": _nested}[kind](draw))
    before = set(folder.rglob("*"))
    outcome, found = held(lambda: _read(path))
    if set(folder.rglob("*")) - before:
        raise Bad("wrote beside the cache")
    if outcome == "refused":
        return outcome
    if found == {path.name: path.read_bytes()}:
        return "taken as a file that is no archive"
    if any(name.startswith("/") or ".." in name.split("/") for name in found):
        raise Bad(f"a name that leaves the folder: {sorted(found)[:3]}")
    if kind in ("zip", "stored", "tgz") and found != FILES:
        raise Bad("damaged, and read as other files")
    if kind == "tar" and found != FILES:
        if set(found) != set(FILES):
            return "read with other names, which the format cannot tell"
        return "read with other contents, which the format cannot tell"
    return outcome


def _read(path: Path) -> dict[str, bytes]:
    with Archive([path]) as archive:
        return {name: archive.read(name) for name in archive.names}


def _links(draw: random.Random) -> bytes:
    content, names = io.BytesIO(), [*STRANGE, "l1", "l2", "l3"]
    if draw.random() < 0.5:
        with tarfile.open(fileobj=content, mode="w") as file:
            for _ in range(draw.randrange(1, 6)):
                info = tarfile.TarInfo(draw.choice(names))
                info.type = draw.choice(LINKS)
                info.linkname = draw.choice(names)
                file.addfile(info)
    else:
        with zipfile.ZipFile(content, "w") as file:
            for _ in range(draw.randrange(1, 6)):
                info = zipfile.ZipInfo(draw.choice([n for n in names if n]))
                info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
                file.writestr(info, draw.choice(names))
    return content.getvalue()


def _unfolds(draw: random.Random) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        if draw.random() < 0.5:
            file.writestr("zeros", bytes(draw.choice([2**20, 2**26, 2**28, 2**29])))
        else:
            for number in range(draw.choice([100, 19_000, 30_000])):
                file.writestr(f"d{number % 7}/{number}", b"")
    return content.getvalue()


def _nested(draw: random.Random) -> bytes:
    found = miniatures.packed(FILES, "zip")
    for level in range(draw.choice([1, 3, 8, 9, 30])):
        inner = {f"{draw.choice(['x', '../x', 'y'])}{level}{draw.choice(['.zip', '.tar', '.tgz'])}": found}
        found = miniatures.packed(inner, draw.choice(["zip", "tar", "tgz"]))
    return damaged(draw, found) if draw.random() < 0.3 else found
