"""Device, threads and random numbers: fixed by parameters, so that a second run gives the same bytes."""

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from stages.core.runtime.errors import InputError
from stages.core.runtime.ranks import join

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare(device: str, threads: int) -> torch.device:
    """Pin the thread count, ask for deterministic kernels, meet the other ranks and return the device.

    ``device``: auto (a GPU where there is one), cpu, cuda or cuda:N; ranks of one machine take one GPU after the
    other. Raises InputError when it is not there.
    """
    torch.set_num_threads(bounded_threads(threads))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device: found {device!r}; allowed here: auto, cpu" + _cuda_names())
        # Not on the CPU, where kernels are deterministic at a fixed thread count and the switch costs a second.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    join(chosen)
    return chosen


@cache
def bounded_threads(threads: int) -> int:
    """As many threads as are asked for, up to four for each core; what is more is said, once."""
    most = 4 * (os.cpu_count() or 1)
    if threads > most:
        log.warning("threads: %d asked for, %d used: four for each core of this machine", threads, most)
    return min(threads, most)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within it glibc gives every freed tensor of some size back to the system: what runs holds no more than it says.

    Elsewhere it keeps those below 32 MiB for others like them. At 224 pixels the first layers leave hundreds of MiB so,
    which what the last layers need does not fit into. But to ask the system for them again takes a third of the time
    of a training step of a small network. Other C libraries have no such setting.
    """
    _keep_freed_below(4 * 2**20)
    try:
        yield
    finally:
        _keep_freed_below(32 * 2**20)


def _keep_freed_below(size: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)
        mallopt(M_TRIM_THRESHOLD, 2 * size)


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator whose stream depends on every number in ``seeds``, in order."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)


def _cuda_names() -> str:
    return "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
