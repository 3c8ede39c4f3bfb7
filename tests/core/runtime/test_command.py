"""What a stage's command line makes of an error: one line for the user's, a traceback for ours."""

import sys

import pytest

from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError


def failing(error):
    def main():
        raise error

    return main


def test_the_users_error_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(SystemExit) as stop:
        command(failing(InputError("budget: found 3;\nallowed: 1 to 2")))
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: budget: found 3; allowed: 1 to 2\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(AssertionError, match="the built network has 7 macs"):
        command(failing(AssertionError("the built network has 7 macs, allocation said 8")))
