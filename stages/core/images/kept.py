"""Decoded images kept between runs: `<cache>/decoded/<recipe>/<count>/{images.npy, index.json}`.

The recipe is a hash of everything the first images of a split depend on, so a file is never stale. An array that
would take more than half of the free disk is not kept: it goes to memory, or is decoded as it is used.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from stages.core.images.decoding import Decoder, Stream
from stages.core.runtime.cache import alone, cache_folder
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_json, write_json

FEWEST = 64  # images; fewer are decoded anew
SHARE = 0.5  # of the free disk or memory that one array may take

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """What is known of some images without decoding them: the first ``len(labels)`` of ``total``."""

    labels: list[int]
    classes: tuple[str, ...]
    total: int


def recipe(version: int, **values: Any) -> Path:
    """The folder of everything decoded from ``values`` (JSON values) by one version of the code."""
    text = json.dumps([version, values], sort_keys=True)
    return cache_folder() / "decoded" / hashlib.sha256(text.encode()).hexdigest()[:40]


def find(folder: Path, limit: int | None) -> tuple[Tensor, Index] | None:
    """The first ``limit`` images (n, c, h, w), memory-mapped, or None where not as many are kept."""
    for count in sorted(_counts(folder)):
        try:
            found = read_json(folder / str(count) / "index.json")
            index = Index(found["labels"], tuple(found["classes"]), found["total"])
            if count < index.total and (limit is None or count < limit):
                continue
            images = np.load(folder / str(count) / "images.npy", mmap_mode="c")
        except (InputError, OSError, EOFError, ValueError, KeyError, TypeError):
            log.warning("%s: damaged in the cache; made again", folder / str(count))
            shutil.rmtree(folder / str(count), ignore_errors=True)
            continue
        return torch.from_numpy(images)[:limit], Index(index.labels[:limit], index.classes, index.total)
    return None


def make(folder: Path, decoder: Decoder, names: Sequence[str], index: Index) -> Tensor | Stream:
    """Decode ``names``: kept on disk where that fits, else in memory, else a stream. Raises InputError."""
    shape = (len(names), decoder.channels, decoder.size, decoder.size)
    needed = int(np.prod(shape))
    if len(names) >= FEWEST:
        try:
            if needed <= SHARE * _free_disk(folder):
                with alone(folder):
                    if (kept := find(folder, len(names))) is None:
                        _write(folder, decoder, names, index, shape)
                        kept = find(folder, len(names))
                if kept is not None:
                    return kept[0]
        except OSError as error:
            log.warning("%s: decoded images cannot be kept (%s)", folder, error.strerror or error)
    if needed <= SHARE * psutil.virtual_memory().available:
        return torch.cat(list(decoder.chunks(names)))
    log.info("%s: %.1f GiB of images do not fit; decoded as they are used", decoder.where, needed / 2**30)
    return Stream(decoder, names)


def _write(
    folder: Path, decoder: Decoder, names: Sequence[str], index: Index, shape: tuple[int, ...]
) -> None:
    """Write the array aside and move it into place; then smaller ones of the same recipe are not needed."""
    smaller = _counts(folder)
    for left in folder.glob("making-*"):  # by a process that was killed: this one holds the folder alone
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix="making-", dir=folder))
    try:
        with open(aside / "images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in decoder.chunks(names):
                file.write(chunk.contiguous().numpy().data)
        write_json(
            aside / "index.json", {"labels": index.labels, "classes": index.classes, "total": index.total}
        )
        shutil.rmtree(folder / str(len(names)), ignore_errors=True)
        os.rename(aside, folder / str(len(names)))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for count in smaller:
        if count < len(names):
            shutil.rmtree(folder / str(count), ignore_errors=True)


def _counts(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except OSError:
        return []


def _free_disk(folder: Path) -> int:
    there = next(path for path in folder.parents if path.exists())
    return shutil.disk_usage(there).free
