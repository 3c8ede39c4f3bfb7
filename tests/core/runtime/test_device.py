"""Threads and generators that every stage has from its parameters."""

import logging
import os
import platform
import resource

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


def faults(size: int) -> int:
    """Pages the system hands out while a tensor of so many bytes is made and freed twenty times."""
    for _ in range(20):
        torch.full((size,), 1, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.full((size,), 1, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_returned_within_and_kept_behind():
    size = 12 * 2**20
    with freed_memory_returned():
        assert faults(size) > 15 * size // 2**21  # at least one for each large page
    assert faults(size) < 15
