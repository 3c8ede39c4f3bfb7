"""How far a long piece of work is: a bar on a terminal, elsewhere one line of the log each minute."""

import io
import logging
import os
import shutil
import sys
from typing import Any

from tqdm import tqdm

DELAY = 2.0  # seconds of work before anything is shown on a terminal
SILENT = os.environ.get("RANK", "0") != "0"  # all ranks are as far
LINE_PERIOD = 60.0  # seconds between two lines where there is none

log = logging.getLogger(__name__)


class Bar(tqdm):
    """tqdm's bar with its arguments; ``shown`` False: nothing at all.

    Gone when the work is done. Without a terminal: `fit pleas: 12 of 40 node, 01:00 gone, about 02:20 left`.
    """

    def __init__(self, *given: Any, shown: bool = True, **named: Any) -> None:
        self.lines = not sys.stderr.isatty()
        if self.lines:
            named |= {"file": io.StringIO(), "delay": LINE_PERIOD, "mininterval": LINE_PERIOD, "miniters": 1}
        else:  # some terminals, of containers say, are of no size, in which nothing would show
            columns, rows = shutil.get_terminal_size()
            named = {"ncols": columns, "nrows": rows, **named}
        super().__init__(*given, **{"delay": DELAY, **named, "leave": False, "disable": not shown or SILENT})

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **named: Any) -> None:
        """tqdm's; a line is never said before its time."""
        super().set_postfix(ordered_dict, refresh and not self.lines, **named)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.lines:
            return super().display(msg, pos)
        if msg is None:  # an empty one takes the bar away at the end
            log.info(self.line())
        return True

    def line(self) -> str:
        """What is done, of how much, and the time that it took and will take."""
        found = self.format_dict
        count = (lambda n: self.format_sizeof(n, self.unit)) if self.unit_scale else (lambda n: f"{n:g}")
        unit = "" if self.unit_scale else f" {self.unit}"
        of = f" of {count(found['total'])}" if found["total"] else ""
        text = f"{self.desc.removesuffix(': ')}: {count(found['n'])}{of}{unit}"
        text += f", {self.format_interval(found['elapsed'])} gone"
        if found["total"] and found["n"] > found["initial"]:
            done = found["n"] - found["initial"]
            left = found["elapsed"] / done * (found["total"] - found["n"])
            text += f", about {self.format_interval(left)} left"
        return text
