"""A zip file of an image folder, read without unpacking it."""

import io
import os
import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stages.core.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_CHUNK = 64  # images per piece of work of a thread


class ImageFolder:
    """`train/<class>/*` and `test/<class>/*` in a zip file, possibly below one top folder.

    ``images[part][class]``: sorted entry names; ``classes``: sorted class names, the same in both parts.
    Entries that are not images (by suffix) and hidden ones are passed over.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError when the file is not a zip file or not such a folder."""
        self.path = path
        self._lock = threading.Lock()  # a ZipFile has one file position
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path}: not a whole zip file ({error})") from error
        try:
            self.images = _index(path, self._zip.namelist())
        except InputError:
            self._zip.close()
            raise
        self.classes = tuple(self.images["train"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, names: Sequence[str], size: int, channels: int) -> Tensor:
        """Decode entries: uint8 (n, channels, size, size), shorter side scaled to ``size``, centre cropped.

        Raises InputError with the name of an image that cannot be read.
        """
        out = torch.empty(len(names), channels, size, size, dtype=torch.uint8)

        def decode(start: int) -> int:
            chunk = names[start : start + _CHUNK]
            for offset, name in enumerate(chunk):
                out[start + offset] = self._decode(name, size, channels)
            return len(chunk)

        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            futures = [pool.submit(decode, start) for start in range(0, len(names), _CHUNK)]
            with tqdm(
                total=len(names), desc=f"reading {self.path.name}", unit="image", delay=3, leave=False
            ) as bar:
                for future in as_completed(futures):
                    bar.update(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
        return out

    def _decode(self, name: str, size: int, channels: int) -> Tensor:
        try:
            with self._lock:
                content = self._zip.read(name)
            with Image.open(io.BytesIO(content)) as image:
                fitted = _fit(image.convert("L" if channels == 1 else "RGB"), size)
        # A damaged image can raise nearly anything: each decoder of PIL has its own exceptions.
        except Exception as error:
            raise InputError(f"{self.path}: {name}: not a readable image ({error})") from error
        return (
            torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
            .view(size, size, -1)
            .permute(2, 0, 1)
        )


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` (bilinear, with antialiasing) and crop the centre."""
    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _index(path: Path, entries: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Entry names by part and class, both sorted."""
    found: dict[str, dict[str, list[str]]] = {}
    tops = set()
    for entry in sorted(entries):
        parts = PurePosixPath(entry).parts
        if ".." in parts or entry.startswith("/") or "\\" in entry:
            raise InputError(f"{path}: entry {entry!r} leaves the folder; allowed: train/... and test/...")
        if entry.endswith("/") or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        depth = next((depth for depth in (0, 1) if parts[depth : depth + 1] in (("train",), ("test",))), None)
        if depth is None or not entry.lower().endswith(SUFFIXES):
            continue
        if len(parts) < depth + 3:
            raise InputError(
                f"{path}: image {entry!r} is in no class folder; allowed: {parts[depth]}/<class>/..."
            )
        tops.add(parts[:depth])
        found.setdefault(parts[depth], {}).setdefault(parts[depth + 1], []).append(entry)
    return _check(path, found, tops, len(entries))


def _check(
    path: Path, found: dict[str, dict[str, list[str]]], tops: set[tuple[str, ...]], entries: int
) -> dict[str, dict[str, list[str]]]:
    allowed = f"allowed: train/<class>/ and test/<class>/ with images ({' '.join(SUFFIXES)})"
    if not entries:
        raise InputError(f"{path}: the zip file is empty; {allowed}")
    missing = [part for part in ("train", "test") if part not in found]
    if missing:
        raise InputError(f"{path}: no images in {' or '.join(f'{part}/' for part in missing)}; {allowed}")
    if len(tops) > 1:
        raise InputError(f"{path}: train and test in several top folders ({sorted(tops)}); allowed: one")
    train, test = set(found["train"]), set(found["test"])
    if train != test:
        raise InputError(
            f"{path}: classes of train and test differ: only in train {sorted(train - test)[:3]}, "
            f"only in test {sorted(test - train)[:3]}; allowed: the same classes in both"
        )
    if len(train) < 2:
        raise InputError(f"{path}: found the one class {next(iter(train))!r}; allowed: two or more")
    return found
