"""A call in the middle of somebody's program: what is set around it changes nothing inside, and is left as found."""

import contextlib
import random
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from stages.core.runtime.errors import InputError

LIBRARIES = ("site-packages", "dist-packages")
OURS = Path(__file__).parents[2]
STANDS_FOR = (
    "_stands_for"  # attribute of a module that is run in the place of a user's: a weak reference to that
)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No autocast, single precision, the CPU, gradients where they are asked for, as torch is at its start.

    The states of the random generators of torch, NumPy and Python are as before when it ends. Determinism flags are
    not touched.
    """
    dtype, state, numpy_state = torch.get_default_dtype(), random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def users_code(what: str, allowed: str) -> Iterator[None]:
    """Whatever the user's own code raises inside becomes one line, with its place in the user's files."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {first_words(error)}"
        raise InputError(f"{what} fails ({said}{place_of(error)}); allowed: {allowed}") from error


def first_words(error: BaseException) -> str:
    """The first line of an exception that says something, cut where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:120] if lines else "no message"


def place_of(error: BaseException) -> str:
    """` at net.py:12`: the last line of the user's own files that an exception went through; empty without one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        own = not any(part in LIBRARIES for part in path.parts) and OURS not in path.parents
        if own and not frame.filename.startswith("<frozen"):
            return f", at {path.name}:{frame.lineno}"
    return ""
