"""The one exception a user is meant to read."""

from collections.abc import Iterable

LONGEST = 300  # characters of a message


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the thing, says what was found and what is allowed: whatever a name or
    another library's message brings with it, it is no more than ``LONGEST`` printable characters. A stage prints it
    and exits with status 1; a notebook sees the exception.
    """

    def __init__(self, message: str) -> None:
        line = " ".join("".join(c if c.isprintable() else " " for c in str(message)).split())
        if len(line) > LONGEST:  # the end says what is allowed
            line = f"{line[: LONGEST // 2 - 2].rstrip()} ... {line[-(LONGEST // 2 - 3) :].lstrip()}"
        super().__init__(line)


def some(names: Iterable[object], most: int = 4) -> str:
    """The first names of many in an error message: `a, b, c, d, ... (30)`."""
    found = [str(name) for name in names]
    return ", ".join(found) if len(found) <= most else f"{', '.join(found[:most])}, ... ({len(found)})"
