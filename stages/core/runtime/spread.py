"""A stage as several processes of this machine, one of which is enough to end them all."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.core.runtime import ranks
from stages.core.runtime.command import GRACE, SAID, say

LOOKS_AT = 0.1  # seconds between two looks at the ranks


def spread(count: int) -> None:
    """Run the command of this process as so many ranks, and end with their status; return where they run already.

    What a rank has to say at its end is said once, by the one that ended first; the others are ended with it.
    """
    if count == 1 or "WORLD_SIZE" in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = [Path(folder) / str(rank) for rank in range(count)]
        running = _start(lines)
        try:
            failed = _wait(running)
        finally:
            _end(running)
        if failed is not None:
            say(_why(failed, running[failed].returncode, lines))
    sys.exit(0 if failed is None else max(1, running[failed].returncode))


def _start(lines: Sequence[Path]) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(len(lines)), "LOCAL_WORLD_SIZE": str(len(lines))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=_loopback()
            | os.environ
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), SAID: str(line)},
        )
        for rank, line in enumerate(lines)
    ]


def _loopback() -> Mapping[str, str]:
    """Gloo asks for the machine's own name otherwise, which not every machine knows."""
    return {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def _wait(running: Sequence[subprocess.Popen]) -> int | None:
    """The first rank that fails, or None when all are done."""
    while True:
        statuses = [process.poll() for process in running]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed:  # of those that ended since the last look, one that did not merely miss another
            return min(failed, key=lambda rank: (statuses[rank] > 0, rank))
        if all(status == 0 for status in statuses):
            return None
        time.sleep(LOOKS_AT)


def _end(running: Sequence[subprocess.Popen]) -> None:
    """As Ctrl-C does, so that nothing half written stays; then for good."""
    left = [process for process in running if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE
    for process in left:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why(failed: int, status: int, lines: Sequence[Path]) -> str:
    """The line of the rank that failed, or of the one that it missed."""
    if status < 0:
        return f"rank {failed}: ended by {signal.Signals(-status).name}; run the same command again"
    own, *others = [path.read_text() if path.exists() else "" for path in (lines[failed], *lines)]
    if own == ranks.GONE:  # for want of another, which was seen to end in the same moment
        own = next((line for line in others if line not in ("", own) and "interrupted" not in line), own)
    return own or f"rank {failed}: ended with status {status}"
