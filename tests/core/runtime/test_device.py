"""Threads and generators that every stage has from its parameters."""

import logging
import os

from stages.core.runtime.device import bounded_threads


def test_more_threads_than_the_machine_can_use_are_bounded_and_said_once(caplog):
    cores = os.cpu_count()
    bounded_threads.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [bounded_threads(n) for n in (1, cores, 4 * cores, 5000, 5000)]
    assert found == [1, cores, 4 * cores, 4 * cores, 4 * cores]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"threads: 5000 asked for, {4 * cores} used")
