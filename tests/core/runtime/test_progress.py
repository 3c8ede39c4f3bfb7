"""Progress where there is no terminal, and the one format of what is logged."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.runtime import progress
from stages.core.runtime.progress import Bar

ROOT = Path(__file__).parents[3]


@pytest.fixture
def no_terminal(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)
    return caplog


def test_without_a_terminal_short_work_says_nothing(no_terminal, capsys):
    for _ in Bar(range(50), desc="fit"):
        pass
    assert no_terminal.messages == []
    assert capsys.readouterr().err == ""


def test_without_a_terminal_long_work_is_a_line_each_period(no_terminal, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress, "LINE_PERIOD", 60.0)
    bar = Bar(total=40, desc="fit pleas", unit="node")
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = now[0]
    for _ in range(40):
        now[0] += 10
        bar.update()
    bar.close()
    assert len(no_terminal.messages) == 6  # 400 seconds
    assert no_terminal.messages[1] == "fit pleas: 12 of 40 node, 02:00 gone, about 04:40 left"


def test_what_stands_behind_the_bar_is_no_line_of_its_own(no_terminal):
    with Bar(total=3, desc="refine") as bar:
        for loss in (3.0, 2.0, 1.0):
            bar.set_postfix({"held out": loss})
            bar.update()
    assert no_terminal.messages == []


def test_bytes_are_readable(no_terminal):
    bar = Bar(total=4_000_000, desc="model.pth", unit="B", unit_scale=True, initial=1_000_000)
    assert bar.line().startswith("model.pth: 1.00MB of 4.00MB, 00:00 gone")
    bar.close()


def test_hidden_work_says_nothing(no_terminal, monkeypatch):
    monkeypatch.setattr(progress, "LINE_PERIOD", 0.0)
    assert list(Bar(range(3), desc="x", shown=False)) == [0, 1, 2]
    assert no_terminal.messages == []


CODE = """
import logging
import os
from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
def main(*words):
    for name, level in (("stages.x", 10), ("stages.x", 20), ("stages.x", 30), ("botocore", 10), ("botocore", 20)):
        logging.getLogger(name).log(level, "%s %s", name, level)
    if words:
        raise InputError("no") from ValueError("why")
command(main, "...")
"""


def run(*words):
    done = subprocess.run([sys.executable, "-c", CODE, *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_one_format():
    assert run() == (0, "stages.x 20\nwarning: stages.x 30\n")
    assert run("bad") == (1, "stages.x 20\nwarning: stages.x 30\nerror: no\n")


def test_verbose_shows_more():
    status, text = run("-v", "bad")
    assert status == 1
    assert " DEBUG stages.x: stages.x 10\n" in text
    assert "botocore" not in text
    assert "ValueError: why" in text
    assert text.endswith("\nerror: no\n")


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of other systems have a size")
@pytest.mark.parametrize("size", [(0, 0), (40, 0), (0, 100), (40, 100)])
def test_a_bar_shows_on_a_terminal_of_any_size(size):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    code = """if True:
        from stages.core.runtime.progress import Bar
        for _ in Bar(range(3), desc='fit', delay=0, mininterval=0):
            pass
        """
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=theirs, check=True, timeout=60)
    assert b"fit: 100%" in os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)
