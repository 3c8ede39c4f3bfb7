"""The benchmarks run, at a small size: what they say is not looked at for its numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from stages.core.runtime.command import command

ROOT = Path(__file__).parents[1]


def test_the_table_of_times_has_every_stage_of_a_pair():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "digits", "--images", "20"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    rows = [
        [word.strip() for word in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    ]
    stages = {row[1] for row in rows if len(row) > 3}
    assert {"statistics", "match", "allocate", "fit", "recalibrate", "match by weights"} <= stages
    fit = next(row for row in rows if row[1:2] == ["fit"])
    assert all(word not in ("0 %", "0%", "") for word in fit[3:6]), (
        fit
    )  # forward, products and solves are seen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nope", "error: benchmarks: found ['nope']; allowed: digits"),
        ("digits --images 0", "error: benchmarks: found 0; allowed"),
        ("latency nope", "error: benchmarks latency: found ['nope']"),
        ("latency resnet20 --budget 3", "error: budget: found 3.0; allowed: a number from 1 to 2"),
        ("refining nope", "error: refining: found nope; allowed: "),
        ("refining --images x", "error: benchmarks refining: argument --images: invalid"),
        ("refining --steps -1", "error: benchmarks refining: found a number that is too small"),
        ("refining --to nowhere/lines.jsonl", "error: --to: nowhere/lines.jsonl cannot be written"),
        ("refining --draw nowhere.jsonl", "error: --draw: nowhere.jsonl cannot be read"),
        ("refining --draw README.md", "error: --draw: README.md: not lines of JSON"),
        ("refining --budget 9", "error: budget: found 9.0; allowed: a number from 1 to 2"),
    ],
)
def test_words_that_cannot_be_used_are_one_line(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    with pytest.raises(SystemExit) as end:
        command(main, "...", helps=False)
    printed = capsys.readouterr().err
    assert end.value.code in (1, 2)
    assert printed.startswith(said)
    assert printed.count("\n") == 1
