"""Queue an experiment for every combination of some values, named by what varies.

python -m stages.vary budget=1.0,1.46 seed=0,1        ->  budget-1.0_seed-0, budget-1.0_seed-1, ...
python -m stages.vary 'methods=${full}' seed=0,1,2    ->  methods-full_seed-0, ...

Then `dvc queue start` runs them. The same settings as those of `dvc exp run -S`, whose names are random words.
"""

import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError, some
from stages.core.runtime.progress import Bar
from stages.core.settings.params import PROFILE_FILES
from stages.core.settings.yaml_text import read_whole
from stages.doctor import unfit_for_queue

SETTING = re.compile(r"(?P<key>\+{0,2}[A-Za-z_][\w.-]*)=(?P<values>.+)")
LONGEST_NAME = 100  # of a file of git's

log = logging.getLogger(__name__)


def main(*words: str) -> None:
    varied = dict(parse(word) for word in words)
    if len(varied) < len(words):
        raise InputError(
            f"vary: found {' '.join(words)}; allowed: each setting once, its values after commas"
        )
    if fault := unfit_for_queue(Path.cwd()):
        raise InputError(f"vary: {fault}")
    read_whole(Path("params.yaml"))  # gate: without it DVC names the setting, not the folder
    names = list(experiments(varied))
    if len({name for name, _ in names}) < len(names):
        raise InputError(
            f"vary: found {' '.join(words)}; allowed: values that give each experiment its own name"
        )
    for name, settings in Bar(names, desc="check", unit="experiment"):
        check(name, settings)
    if there := taken() & {name for name, _ in names}:
        raise InputError(
            f"vary: found {some(sorted(there))}, done or queued on this commit; allowed: other values, or first "
            "dvc exp remove NAME, dvc queue remove NAME"
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


def check(name: str, settings: Sequence[str]) -> None:
    """params.yaml as DVC would set it, looked at as the first stage does. Raises InputError in one line."""
    # here: they take a second to import
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from stages.artifacts.settings import checked_params

    try:
        sweep = get_hydra_sweeps({"params.yaml": list(settings)})  # of a value such as range(0, 3)
    except (DvcException, HydraException) as error:
        raise _refused(name, error) from error
    for one in sweep:
        with TemporaryDirectory() as folder:
            for file in filter(os.path.isfile, PROFILE_FILES):
                shutil.copyfile(file, Path(folder, file))
            with chdir(folder):  # messages name the file, not where its copy is
                try:
                    apply_overrides("params.yaml", one["params.yaml"])
                except (DvcException, HydraException, OmegaConfBaseException) as error:
                    raise _refused(name, error) from error
                try:
                    checked_params()
                except InputError as error:
                    raise InputError(f"vary: {name}: {error}") from error


def _refused(name: str, error: Exception) -> InputError:
    """What DVC's parser of settings says; of its own exceptions the cause alone says it."""
    said = str(error.__cause__ or error).partition("\n")[0]
    return InputError(f"vary: {name}: {said}; allowed: a key of params.yaml and a value, as `-S` takes them")


def taken() -> set[str]:
    """Names of experiments of this commit that are done, run or wait: DVC refuses the first, and fails at the others.

    Raises InputError where there is no DVC project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo() as repo:
            commit, queued = repo.scm.get_rev(), repo.experiments.celery_queue
            done = {name for found in repo.experiments.ls().values() for name, _ in found}
            waiting = [*queued.iter_queued(), *queued.iter_active()]
            return done | {own.name for own in waiting if own.name and own.baseline_rev == commit}
    except (DvcException, SCMError, OSError) as error:
        raise InputError(
            f"vary: dvc cannot list experiments ({error}); allowed: a clone with a commit, that can be written"
        ) from error


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
