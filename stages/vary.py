"""Queue an experiment for every combination of some values, named by what varies.

python -m stages.vary budget=1.0,1.46 seed=0,1        ->  budget-1.0_seed-0, budget-1.0_seed-1, ...
python -m stages.vary 'methods=${full}' seed=0,1,2    ->  methods-full_seed-0, ...

Then `dvc queue start` runs them. The same settings as those of `dvc exp run -S`, whose names are random words.
"""

import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
from stages.core.runtime.progress import Bar
from stages.core.settings.yaml_text import read_whole

SETTING = re.compile(r"(?P<key>\+{0,2}[A-Za-z_][\w.-]*)=(?P<values>.+)")
LONGEST_NAME = 100  # of a file of git's

log = logging.getLogger(__name__)


def main(*words: str) -> None:
    varied = dict(parse(word) for word in words)
    if len(varied) < len(words):
        raise InputError(
            f"vary: found {' '.join(words)}; allowed: each setting once, its values after commas"
        )
    if not (here := str(Path.cwd())).isascii():
        raise InputError(
            f"vary: found the folder {here!a}; allowed: ASCII letters, else DVC's queue fails in it"
        )
    read_whole(Path("params.yaml"))  # gate: without it DVC names the setting, not the folder
    names = list(experiments(varied))
    if len({name for name, _ in names}) < len(names):
        raise InputError(
            f"vary: found {' '.join(words)}; allowed: values that give each experiment its own name"
        )
    for name, settings in Bar(names, desc="queue", unit="experiment"):
        queue(name, settings)
        log.info("%s", name)
    log.info(
        "%d experiments in the queue; run them: dvc queue start; compare: python -m stages.report --experiments",
        len(names),
    )


def parse(word: str) -> tuple[str, list[str]]:
    """A setting and its values. Raises InputError for anything else."""
    found = SETTING.fullmatch(word)
    values = split(found["values"]) if found else []
    if found is None or not all(values):
        raise InputError(
            f"vary: found {word!r}; allowed: a key of params.yaml and values, as budget=1.0,1.46"
        )
    return found["key"], values


def split(text: str) -> list[str]:
    """At the commas that no bracket or quote is around: `{a: 1, b: 2},3` is two values."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "\"'" and quote in ("", letter):
            quote = "" if quote else letter
        depth += 0 if quote else (letter in "[{(") - (letter in ")}]")
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def experiments(varied: dict[str, Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """Name and settings of every combination. What has one value alone is in no name, unless all have."""
    named = {key for key, values in varied.items() if len(values) > 1} or set(varied)
    for values in itertools.product(*varied.values()):
        pairs = list(zip(varied, values, strict=True))
        words = [f"{plain(key)}-{plain(value)}" for key, value in pairs if key in named]
        yield "_".join(words)[:LONGEST_NAME].rstrip("-_."), [f"{key}={value}" for key, value in pairs]


def plain(text: str) -> str:
    """What git and a file system take in a name."""
    return re.sub(r"[^A-Za-z0-9.]+|\.(?=\.|lock)", "-", text).strip("-.")


def queue(name: str, settings: Sequence[str]) -> None:
    """Add one experiment. Raises InputError with what DVC says."""
    words = [word for setting in settings for word in ("-S", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "run", "--queue", "--name", name, *words],
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise InputError(f"vary: {name}: {' '.join(said).removeprefix('ERROR: ')}")


if __name__ == "__main__":
    command(main, "key=value[,value]", "...")
