"""`dvc repro` and `dvc exp run` of a small pipeline, killed at a random moment in one of several ways.

Good: the same command again ends well and gives the bytes of an undisturbed run; nothing of ours runs on, no temporary
file is left, git is on its branch and params.yaml is as it was. Not a part of the gate: a case takes two runs.
"""

import functools
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from test_end_to_end import Clone

from tests.campaigns.rule import Bad

COMMANDS = (("dvc", "repro"), ("dvc", "exp", "run"))
METHODS = {
    "average": {"match": "identity", "fit": {"solver": "average"}},
    "progressive": {
        "match": "activations",
        "fit": {"solver": "exact", "inputs": "merged", "targets": "own", "norm": "fold"},
    },
}
SMALL = {"statistics__images": 100, "fit__images": 100, "recalibrate__images": 100, "probe__test_images": 100,
         "probe__linear_images": 100, "probe__latency_repeats": 1, "profiles__digits__finetune__epochs": 2}  # fmt: skip
LIMIT = 900.0  # seconds of a run on a busy machine


@functools.cache
def undisturbed(folder: Path) -> tuple[Clone, dict[str, str], float]:
    """A workspace that never ran, what a run in it leaves, and how long that takes."""
    base = Clone(folder / "base")
    base.change(methods=METHODS, **SMALL)
    _commit(base)
    first = _copy(base, folder / "first")
    started = time.monotonic()
    first.run(*COMMANDS[0], timeout=LIMIT)
    return base, _left(first), time.monotonic() - started


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    base, expected, seconds = undisturbed(folder)
    command, how = draw.choice(COMMANDS), draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    everybody = draw.random() < 0.5
    clone = _copy(base, folder / "case")
    process = clone.start(*command)
    after = draw.uniform(0, seconds)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        (os.killpg if everybody else os.kill)(process.pid, how)
    what = f"{' '.join(command)}, {how.name} to {'all' if everybody else 'dvc'} after {after:.0f} s of {seconds:.0f}"
    process.communicate(timeout=LIMIT)  # while a stage runs, dvc leaves a Ctrl-C to it alone and goes on
    _nobody_left(clone, what)
    again = clone.start(*command)
    output, _ = again.communicate(timeout=LIMIT)
    if again.returncode:
        raise Bad(f"{what}: the same command again fails: {output.strip()[-300:]}")
    if _left(clone) != expected:
        raise Bad(f"{what}: other bytes: {sorted(set(_left(clone).items()) ^ set(expected.items()))[:2]}")
    return f"read after {how.name}{_tidy(clone, what)}"


def _copy(base: Clone, folder: Path) -> Clone:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base.folder, folder, symlinks=True)
    made = object.__new__(Clone)
    made.folder, made.env = folder, base.env
    return made


def _commit(clone: Clone) -> None:
    for words in (["add", "-A"], ["commit", "-q", "-m", "small"]):
        subprocess.run(["git", *words], cwd=clone.folder, env=clone.env, check=True)


def _left(clone: Clone) -> dict[str, str]:
    """Hashes of the networks that a run leaves."""
    return {
        str(path.relative_to(clone.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((clone.folder / "models").rglob("*.safetensors"))
    }


def _nobody_left(clone: Clone, what: str) -> None:
    """Stages end soon after their dvc, however that ends."""
    deadline = time.monotonic() + 20
    while running := [p for p in psutil.process_iter(["cmdline"]) if _of(p, clone)]:
        if time.monotonic() > deadline:
            raise Bad(f"{what}: still runs after 20 s: {' '.join(running[0].info['cmdline'])[:100]}")
        time.sleep(0.2)


def _of(process: psutil.Process, clone: Clone) -> bool:
    try:
        return "stages." in " ".join(process.info["cmdline"] or []) and Path(process.cwd()) == clone.folder
    except psutil.Error:
        return False


def _tidy(clone: Clone, what: str) -> str:
    """Raises Bad for what is left over without a word; else what is left and said."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", *words], cwd=clone.folder, env=clone.env, capture_output=True, text=True
        )

    said = ""
    if git("symbolic-ref", "-q", "HEAD").returncode:
        told = subprocess.run(
            [sys.executable, "-m", "stages.doctor"],
            cwd=clone.folder,
            env=clone.env,
            capture_output=True,
            text=True,
        ).stdout
        if "git is on no branch" not in told:
            raise Bad(f"{what}: git is on no branch, and the doctor does not say so")
        said = ", git on no branch, which the doctor says"
    changed = git("status", "--porcelain", "--ignored").stdout.split("\n")
    if temporary := [line for line in changed if line.endswith(".tmp")]:
        raise Bad(f"{what}: left {temporary[0]}")
    if any(line[3:] == "params.yaml" for line in changed):
        raise Bad(f"{what}: params.yaml is another")
    if git("stash", "list").stdout:
        raise Bad(f"{what}: a stash is left")
    return said
