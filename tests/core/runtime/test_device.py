"""Threads and generators that every stage has from its parameters."""

import ctypes
import logging
import os

import pytest
import torch

from stages.core.runtime.device import bounded_threads, freed_memory_returned


def test_more_threads_than_the_machine_can_use_are_bounded_and_said_once(caplog):
    cores = os.cpu_count()
    bounded_threads.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [bounded_threads(n) for n in (1, cores, 4 * cores, 5000, 5000)]
    assert found == [1, cores, 4 * cores, 4 * cores, 4 * cores]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"threads: 5000 asked for, {4 * cores} used")


class Counts(ctypes.Structure):
    """What mallinfo2 of glibc returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def mapped() -> int:
    """Bytes in blocks that malloc has mapped for themselves: freed, they are back with the system at once."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = Counts
    return count().hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="a count of glibc 2.33 and later")
def test_freed_memory_is_returned_within_and_kept_behind():
    size, before = 12 * 2**20, mapped()
    with freed_memory_returned():
        tensor = torch.full((size,), 1, dtype=torch.uint8)
        assert mapped() - before >= size
        del tensor
        assert mapped() <= before
    tensor = torch.full((size,), 1, dtype=torch.uint8)
    assert mapped() <= before
    del tensor
