"""Device, threads and random numbers: fixed by parameters, so that a second run gives the same bytes."""

import os

import torch

from stages.core.errors import InputError


def prepare(device: str, threads: int) -> torch.device:
    """Pin the thread count, ask for deterministic kernels and return the device.

    ``device``: auto (a GPU where there is one), cpu, cuda or cuda:N. Raises InputError when it is not there.
    """
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device: found {device!r}; allowed here: auto, cpu" + _cuda_names())
        # Not on the CPU, where kernels are deterministic at a fixed thread count and the switch costs a second.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return chosen


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator whose stream depends on every number in ``seeds``, in order."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)


def _cuda_names() -> str:
    return "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
