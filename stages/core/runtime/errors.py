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


def shown(value: object) -> str:
    """``repr`` without the middle of a long one, for an error message.

    Python refuses to write a whole number of thousands of digits, and a stranger's own ``__repr__`` may raise anything.
    """
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number beyond 10**60"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001
        text = f"something of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"
