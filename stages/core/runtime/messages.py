"""The one format of everything that is logged, on stderr: the lines of our code, and warnings of others."""

import logging
import os
import sys

LOGGERS = ("stages", "__main__")
VERBOSE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Lines(logging.Formatter):
    """A message as it is; `warning: ...` and `error: ...` in front of what is more than that."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"{record.levelname.lower()}: {line}" if record.levelno >= logging.WARNING else line


def start_logging(verbose: bool = False) -> None:
    """Log to stderr from now on. verbose: time, level and place of each line, and what is for developers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(VERBOSE, "%H:%M:%S") if verbose else Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.DEBUG if verbose else logging.INFO
    if os.environ.get("RANK", "0") != "0":  # all ranks have the same to say
        level = logging.ERROR
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level)
