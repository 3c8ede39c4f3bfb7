"""The rule that all campaigns share: refused in one line, in time and in memory, or read as what it is."""

import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

from stages.core.runtime.errors import LONGEST, InputError

SECONDS = 30.0  # of one case, on a busy machine
GROWTH = 1 << 30  # bytes by which the process may grow


class Bad(Exception):  # noqa: N818 (what a campaign looks for, not an error of its own)
    """A case that was not taken as it should be."""


def held(call: Callable[[], Any]) -> tuple[str, Any]:
    """("refused", the line) or ("read", what the call gives). Raises Bad for anything else."""
    before, started = _peak(), time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = "read", call()
    except InputError as error:
        line = str(error)
        if "\n" in line or len(line) > LONGEST:
            raise Bad(f"more than a line: {line[:80]!r}") from error
        outcome = "refused", line
    except MemoryError as error:
        raise Bad("out of memory") from error
    except Exception as error:
        raise Bad(f"{type(error).__name__}: {str(error)[:200]}") from error
    if (took := time.monotonic() - started) > SECONDS:
        raise Bad(f"took {took:.0f} s")
    if (grew := _peak() - before) > GROWTH:
        raise Bad(f"took {grew / 2**30:.1f} GiB")
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes with one accident: bits flipped, cut, zeros, a piece twice or missing, something behind."""
    found, at = bytearray(content), draw.randrange(len(content))
    size = min(draw.choice([1, 8, 512, 4096]), len(content) - at)
    match draw.choice(["bit", "bit", "bits", "cut", "zeros", "twice", "missing", "more"]):
        case "bit":
            found[at] ^= 1 << draw.randrange(8)
        case "bits":
            for _ in range(draw.randrange(2, 30)):
                found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
        case "cut":
            del found[at:]
        case "zeros":
            found[at : at + size] = bytes(size)
        case "twice":
            found[at:at] = found[at : at + size]
        case "missing":
            del found[at : at + size]
        case "more":
            found += draw.randbytes(size)
    return bytes(found)
