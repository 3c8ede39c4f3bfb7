"""Where a sweep keeps its values, batch by batch: in memory, or in files of the cache folder.

On disk each value of each network is one file, written and read in order, a batch at a time. It has no name from its
birth, so that it is gone with the process however that ends, and its place is free as soon as it is closed: nothing
is left to clear away, and runs beside each other share nothing but the disk. Reading maps a batch into memory, which
copies nothing that the system still has at hand.
"""

import bisect
import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from stages.core.runtime.cache import cache_folder
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import CLOSED, FULL
from stages.core.runtime.files import sweep as clear

AT_ONCE = 2**30  # bytes that the system is asked to write at a time: it writes no more than 2 GiB


class Kept(Protocol):
    """Those of one node of one network, or what else a sweep keeps of all images: one tensor for each batch."""

    def append(self, value: Tensor) -> None: ...

    def __getitem__(self, batch: int) -> Tensor: ...

    def rows(self, batch: int, chosen: Tensor) -> Tensor:
        """Some images of a batch alone. chosen: int64 (n,)."""
        ...

    def free(self, batch: int) -> None:
        """What it held of a batch will not be asked for again."""
        ...

    def close(self) -> None:
        """Nor anything else."""
        ...


class InMemory:
    """Tensors as they are."""

    def __init__(self, values: Sequence[Tensor] = ()) -> None:
        self._values: list[Tensor | None] = list(values)

    def append(self, value: Tensor) -> None:
        self._values.append(value)

    def __getitem__(self, batch: int) -> Tensor:
        return self._values[batch]

    def rows(self, batch: int, chosen: Tensor) -> Tensor:
        return self._values[batch][chosen]

    def free(self, batch: int) -> None:
        self._values[batch] = None

    def close(self) -> None:
        self._values.clear()


@dataclass(frozen=True)
class _Piece:
    """Where a tensor is in a file, and how it lies there."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def read(self, file: BinaryIO) -> Tensor:
        """It, in the order of memory that it had."""
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=self.start)
        mapped.madvise(mmap.MADV_WILLNEED)
        flat = torch.frombuffer(mapped, dtype=self.dtype)
        return flat.as_strided(self.shape, self.strides).to(self.device)


class OnDisk:
    """Tensors in a file without a name in the cache folder.

    They come back bit for bit, in the order of memory that they had. Raises InputError when the folder cannot be
    written or its disk is full.
    """

    def __init__(self) -> None:
        self._file, self._end = _nameless(scratch()), 0
        self._pieces: list[_Piece] = []
        weakref.finalize(self, self._file.close)  # what nobody closes goes without a ResourceWarning

    def append(self, value: Tensor) -> None:
        value = _dense(value)
        strides = tuple(value.stride())
        here = value.cpu()
        flat = here.as_strided((here.numel(),), (1,), here.storage_offset())
        _write(self._file, memoryview(flat.detach().view(torch.uint8).numpy()), self._end)
        self._pieces.append(_Piece(self._end, tuple(value.shape), strides, value.dtype, value.device))
        self._end += -(-flat.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def __getitem__(self, batch: int) -> Tensor:
        return self._pieces[batch].read(self._file)

    def rows(self, batch: int, chosen: Tensor) -> Tensor:
        return self[batch][chosen.to(self._pieces[batch].device)]

    def free(self, batch: int) -> None:
        """A file gives its place back as a whole."""

    def close(self) -> None:
        self._file.close()


class ImagesOnDisk:
    """Images of a notebook, in a file as a sweep's values are; they are given up with the last that asks for them."""

    def __init__(self) -> None:
        self._values, self._starts, self._count = OnDisk(), [], 0

    def add(self, images: Tensor) -> Tensor:
        """Keep some; returns what they are asked for by: int64 (n,)."""
        self._values.append(images)
        self._starts.append(self._count)
        self._count += len(images)
        return torch.arange(self._starts[-1], self._count)

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """chosen: int64 (n,), of those that were added together."""
        piece = bisect.bisect_right(self._starts, int(chosen[0])) - 1
        own, count = chosen - self._starts[piece], len(chosen)
        if torch.equal(own, torch.arange(start := int(own[0]), start + count)):  # nothing need be copied
            return self._values[piece].narrow(0, start, count)
        return self._values.rows(piece, own)


@dataclass
class Keeper:
    """Makes the places of a sweep's values, all of one kind, and gives them up."""

    on_disk: bool = False
    _open: list[Kept] = field(default_factory=list)

    def new(self) -> Kept:
        made = OnDisk() if self.on_disk else InMemory()
        if self.on_disk:
            self._open.append(made)
        return made

    def close(self) -> None:
        """Give up all that is on disk: also when a sweep ends early, whose values a traceback may hold for long."""
        while self._open:
            self._open.pop().close()


def scratch() -> Path:
    """The folder of the files."""
    return cache_folder() / "values"


def free_disk() -> int:
    """Bytes that the disk of the cache folder has left."""
    folder = scratch()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _nameless(folder: Path) -> BinaryIO:
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear(
            folder
        )  # where the system has none without a name, one that was killed while it took the name away
        return tempfile.TemporaryFile(buffering=0, prefix=".", suffix=".tmp", dir=folder)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """One line where the disk is full or closed."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise InputError(
                f"{folder}: no space left on the device; allowed: fewer images, storage: memory, or XDG_CACHE_HOME "
                "on a larger disk"
            ) from error
        if error.errno in (*CLOSED, errno.EEXIST):
            raise InputError(
                f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
            ) from error
        raise


def _dense(value: Tensor) -> Tensor:
    """Without gaps: as it is where it can be, so that its order stays."""
    strides = [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]
    sizes = [size for size in value.shape if size > 1]
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if stride != expected:
            return value.contiguous()
        expected *= size
    return value


def _write(file: BinaryIO, content: memoryview, at: int) -> None:
    done = 0
    with _explained(scratch()):
        while done < len(content):
            done += os.pwrite(file.fileno(), content[done : done + AT_ONCE], at + done)
