"""Stages of one kind, one after another, without importing torch for each: as copies of a process that has (Linux).

DVC runs every fit as a command of its own, and importing torch takes longer than the fit of a small network. The first
of them leaves a process behind that has imported what the stage imports and done nothing else. It and all that follow
ask that process for a copy of itself, which runs in their place with their words, environment and output, and wait for
its status. The process ends with the DVC that runs the stages, or a minute after the last; it serves nobody else. Where
it cannot be had, or its code, environment or folder is not the stage's, the stage runs by itself, as it does with
``STAGES_ALONE=1``.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ALONE = "STAGES_ALONE"
IDLE = 60.0  # seconds after which nobody is expected to ask
INTERRUPT = b"i"
STATUS = struct.Struct("i")  # of a copy, negative for a signal
PEER = struct.Struct("3i")  # process, user, group
CODE = Path(__file__).parents[2]


def run_as_copy(stage: str, dvc: int, watched: Callable[[], None], gone: Callable[[str], None]) -> None:
    """End with the status of a copy; return in that copy, and where none is to be had.

    dvc: the process that runs the stages. watched: has this process end with it. gone: says that what runs the copy
    has ended, and ends it too.
    """
    if sys.platform != "linux" or os.environ.get(ALONE, "") not in ("", "0") or "WORLD_SIZE" in os.environ:
        return
    try:
        waits = os.pidfd_open(dvc)
        asked = _connected(dvc) or _started(stage, dvc, waits, gone)
        os.close(waits)
    except OSError:  # no such sockets or processes here
        return
    if asked is not None:
        _wait_for(asked, watched)


def _address(dvc: int) -> str:
    """Of no file (unix(7), abstract): it is gone with the process. Numbers of processes return, with another start."""
    started = Path(f"/proc/{dvc}/stat").read_text().rpartition(")")[2].split()[19]
    return f"\0stages-{os.getuid()}-{dvc}-{started}"


def _connected(dvc: int) -> socket.socket | None:
    asked = socket.socket(socket.AF_UNIX)
    try:
        asked.connect(_address(dvc))
    except ConnectionRefusedError:
        asked.close()
        return None
    return asked


def _started(stage: str, dvc: int, waits: int, gone: Callable[[str], None]) -> socket.socket | None:
    """A connection to a process that is started for it; None in a copy of that."""
    listens = socket.socket(socket.AF_UNIX)
    listens.bind(_address(dvc))
    listens.listen()
    if os.fork():
        listens.close()
        return _connected(dvc)
    _serve(stage, listens, waits, gone)
    return None


def _wait_for(asked: socket.socket, watched: Callable[[], None]) -> None:
    """End as the copy does; return where this process is refused one."""
    if not _of_this_user(asked):
        return
    wanted = {"stamp": _stamp(), "argv": sys.argv, "words": sys.orig_argv}
    wanted["environment"] = dict(os.environ)
    said = json.dumps(wanted).encode()
    try:
        socket.send_fds(asked, [struct.pack("q", len(said))], [0, 1, 2])
        asked.sendall(said)
        if asked.recv(1) != b"y":
            return
    except OSError:
        return
    watched()
    status = b""
    while len(status) < STATUS.size:
        try:
            found = asked.recv(STATUS.size - len(status))
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # it has just ended
                asked.sendall(INTERRUPT)
            continue
        if not found:  # that process was killed, and its copy ends
            _end(-signal.SIGKILL)
        status += found
    _end(*STATUS.unpack(status))


def _end(status: int) -> NoReturn:
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _serve(stage: str, listens: socket.socket, waits: int, gone: Callable[[str], None]) -> None:
    """Return in copies alone."""
    try:
        os.setsid()  # the stages hear Ctrl-C and tell their copies
        nothing = os.open(os.devnull, os.O_RDWR)
        for own in (0, 1, 2):
            os.dup2(nothing, own)
        stamp = _stamp()
        importlib.import_module(f"{stage}.__main__")
        del sys.modules[f"{stage}.__main__"]  # which runs as __main__
        while True:
            ready, *_ = select.select([listens, waits], [], [], IDLE)
            if waits in ready or not ready:
                os._exit(0)
            with listens.accept()[0] as asked:
                wanted, given = _read(asked) if _of_this_user(asked) else ({}, [])
                if wanted.get("stamp") != stamp:
                    os._exit(0)  # the next starts another
                if not (process := os.fork()):
                    listens.close()
                    _become(wanted, given, asked.dup(), gone)
                    return
                for own in given:
                    os.close(own)
                found = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with contextlib.suppress(BrokenPipeError):  # what asked was killed
                    asked.send(STATUS.pack(found))
    except Exception:  # noqa: BLE001 (whoever asks runs the stage by itself, and says what is wrong)
        os._exit(1)


def _read(asked: socket.socket) -> tuple[dict, list[int]]:
    head, given, *_ = socket.recv_fds(asked, 8, 3)
    left, said = struct.unpack("q", head)[0], b""
    while left > len(said) and (found := asked.recv(left - len(said))):
        said += found
    return json.loads(said), given


def _become(wanted: dict, given: list[int], asked: socket.socket, gone: Callable[[str], None]) -> None:
    """What asks, in all that a stage sees of it."""
    for own, number in zip(given, (0, 1, 2), strict=True):
        os.dup2(own, number)
        os.close(own)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv[:], sys.orig_argv[:] = wanted["argv"], wanted["words"]
    asked.send(b"y")
    threading.Thread(target=_hear, args=(asked, gone), daemon=True).start()


def _hear(asked: socket.socket, gone: Callable[[str], None]) -> None:
    while asked.recv(1) == INTERRUPT:
        os.kill(os.getpid(), signal.SIGINT)
    gone("process")


def _of_this_user(asked: socket.socket) -> bool:
    found = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    return PEER.unpack(found)[1] == os.getuid()


def _stamp() -> list:
    """What the imported code depends on: it is the stage's own while this is the same."""
    code = sorted((str(path), path.stat().st_mtime_ns) for path in CODE.rglob("*.py"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    return json.loads(json.dumps([code, environment, sys.executable, sys.path, os.getcwd()]))
