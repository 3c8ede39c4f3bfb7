"""What every stage's command line does around its one sentence."""

import logging
import os
import sys
from collections.abc import Callable

from stages.core.runtime.errors import InputError


def command(main: Callable[..., None], *arguments: str) -> None:
    """Call ``main`` with the words of the command line and exit with its status.

    ``arguments`` names the words that must be there; a last one of "..." allows more. An
    InputError becomes one line on stderr and status 1;
    Ctrl-C becomes status 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stage = main.__module__ if main.__module__ != "__main__" else _module_name()
    words = sys.argv[1:]
    more = arguments[-1:] == ("...",)
    least = len(arguments) - more
    if len(words) < least or (len(words) > least and not more):
        usage = " ".join([f"python -m {stage}", *(n if n == "..." else f"<{n}>" for n in arguments)])
        print(f"error: {stage}: found {len(words)} arguments; usage: {usage}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    try:
        main(*words)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"error: {stage}: interrupted; run the same command again", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else os.path.basename(sys.argv[0])
