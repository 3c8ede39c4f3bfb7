"""Files that one stage leaves for another, where something else lies in their place."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from stages.core.runtime.errors import InputError

DAMAGES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def left_by(stage: str, path: str | Path) -> Iterator[None]:
    """What is read from ``path`` inside is what ``stage`` has written. Raises InputError where it is not."""
    try:
        yield
    except InputError:
        raise
    except DAMAGES as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path}: not what the stage {stage} leaves ({said:.100}); run: dvc repro -f {stage}"
        ) from error
