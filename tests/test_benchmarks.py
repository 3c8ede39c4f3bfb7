"""The benchmarks run, at a small size: what they say is not looked at for its numbers."""

import subprocess
import sys
from pathlib import Path

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
