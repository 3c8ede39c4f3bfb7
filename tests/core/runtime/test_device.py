"""Threads and generators that every stage has from its parameters."""

import ctypes
import json
import logging
import os
import subprocess
import sys

import pytest

from stages.core.runtime.device import bounded_threads


def test_more_threads_than_the_machine_can_use_are_bounded_and_said_once(caplog):
    cores = os.cpu_count()
    bounded_threads.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [bounded_threads(n) for n in (1, cores, 4 * cores, 5000, 5000)]
    assert found == [1, cores, 4 * cores, 4 * cores, 4 * cores]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"threads: 5000 asked for, {4 * cores} used")


MAPPED = """
import ctypes, json
import torch
from stages.core.runtime.device import freed_memory_returned

class Counts(ctypes.Structure):  # what mallinfo2 of glibc returns
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

def mapped():  # bytes in blocks that are mapped for themselves: freed, they are back with the system at once
    count = ctypes.CDLL(None).mallinfo2
    count.restype = Counts
    return count().hblkhd

found = [mapped()]
with freed_memory_returned():
    tensor = torch.full((12 * 2**20,), 1, dtype=torch.uint8)
    found.append(mapped())
    del tensor
    found.append(mapped())
tensor = torch.full((12 * 2**20,), 1, dtype=torch.uint8)
print(json.dumps([*found, mapped()]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="a count of glibc 2.33 and later")
def test_freed_memory_is_returned_within_and_kept_behind():
    """In a process of its own: what others have freed before would be used again."""
    done = subprocess.run([sys.executable, "-c", MAPPED], stdout=subprocess.PIPE, text=True, check=True)
    before, within, freed, behind = json.loads(done.stdout)
    assert within - before >= 12 * 2**20
    assert freed == before
    assert behind == before
