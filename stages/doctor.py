"""Is this machine fit? Ten lines, in seconds, with and without a network: ``python -m stages.doctor``.

ok      as it should be
note    works without; the line says what then does not
wrong   the pipeline cannot run so; the line says what to do, and the exit status is 1
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError

Checked = tuple[str, str]  # (ok | note | wrong, what was found)

TIMEOUT = 2.0  # seconds that the bucket has to answer; artifacts.timeout where that is less
LEAST_PYTHON, LEAST_MEMORY, LEAST_DISK = (3, 11), 2.0, 2.0  # GiB: the embedded default needs less
INSTALL = "run make repro, or pip install -r requirements.txt"


def main() -> None:
    """Write the ten lines to stdout. Raises InputError when one of them is wrong."""
    wrong = []
    for name, (state, found) in lines(Path()):
        sys.stdout.write(f"{state:<6}{name:<9}{found}\n")
        sys.stdout.flush()  # a line at a time: the last ones take a moment
        wrong += [name] if state == "wrong" else []
    if wrong:
        raise InputError(f"doctor: {', '.join(wrong)}: not fit yet, see above")


def lines(top: Path) -> Iterator[tuple[str, Checked]]:
    """(name, line) of every check of the project in the folder ``top``; a check that fails in itself is a line too."""
    checks: dict[str, Callable[[Path], Checked]] = {
        "python": python,
        "packages": packages,
        "torch": torch,
        "gpu": gpu,
        "memory": memory,
        "disk": disk,
        "cache": cache,
        "project": project,
        "remote": remote,
        "bucket": bucket,
    }
    for name, check in checks.items():
        try:
            yield name, check(top)
        except ImportError as error:
            yield name, ("wrong", f"{error}; {INSTALL}")
        except InputError as error:
            yield name, ("wrong", " ".join(str(error).split()))


def python(top: Path) -> Checked:
    """The interpreter."""
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < LEAST_PYTHON:
        return "wrong", f"{found}; allowed: {'.'.join(map(str, LEAST_PYTHON))} or later"
    return "ok", found


def packages(top: Path) -> Checked:
    """What requirements.txt pins against what is installed."""
    pinned = pins(top / "requirements.txt")
    missing, other = [], []
    for name, version in pinned.items():
        try:
            # A build for one kind of GPU or for none says so behind a plus sign.
            if (found := metadata.version(name).split("+")[0]) != version:
                other.append(f"{name} {found} for {version}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return "wrong", f"missing: {', '.join(missing)}; {INSTALL}"
    if other:
        return "note", f"other than pinned: {', '.join(other)}; results may differ in the last digits"
    return "ok", f"all {len(pinned)} as pinned"


def pins(path: Path) -> dict[str, str]:
    """{package: version} of a requirements file. Raises InputError when it is not there."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; run from the top folder of the project")
    found = (line.split("#")[0].strip().partition("==") for line in path.read_text().splitlines())
    return {name.split("[")[0]: version for name, _, version in found if name}


def torch(top: Path) -> Checked:
    """The versions, and how many threads there are for them."""
    import torch
    import torchvision  # a pair that does not fit together fails here

    return "ok", f"{torch.__version__}, torchvision {torchvision.__version__}, {os.cpu_count()} processors"


def gpu(top: Path) -> Checked:
    """Every GPU that torch can use."""
    import torch

    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch is built without"
        )
        return "note", f"none ({built}); everything runs on the CPU"
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"{torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} GiB free")
    return "ok", "; ".join(found)


def memory(top: Path) -> Checked:
    """What is free now: what a sweep may use by default."""
    import psutil

    found = psutil.virtual_memory()
    line = f"{_gib(found.available)} of {_gib(found.total)} GiB free"
    if found.available < LEAST_MEMORY * 2**30:
        return "note", f"{line}; large networks need more: lower statistics.images and fit.images"
    return "ok", line


def disk(top: Path) -> Checked:
    """The disk that the project is on: data, models and DVC's cache."""
    free = shutil.disk_usage(top).free
    line = f"{_gib(free)} GiB free for the project in {top.resolve()}"
    if free < LEAST_DISK * 2**30:
        return "note", f"{line}; merged networks of ResNet-50 take 0.1 GiB a method, data sets up to 140 GiB"
    return "ok", line


def cache(top: Path) -> Checked:
    """The folder for what is kept between runs: downloads and decoded images."""
    from stages.core.runtime.cache import cache_folder

    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return "wrong", f"{folder}: {there} cannot be written; set XDG_CACHE_HOME to a folder that can"
    return "ok", f"{folder}, {_gib(shutil.disk_usage(there).free)} GiB free"


def project(top: Path) -> Checked:
    """DVC works in a git repository, and params.yaml can be read."""
    if shutil.which("git") is None:
        return "wrong", "git is not installed, which DVC needs"
    lost = [name for name in (".git", ".dvc/config", "dvc.yaml") if not (top / name).exists()]
    if lost:
        return "wrong", f"no {', '.join(lost)} in {top.resolve()}; work in a clone, DVC needs its git history"
    params = _params(top)
    head = top / ".git" / "HEAD"
    if head.is_file() and not head.read_text().startswith("ref:"):
        return "note", (
            "git is on no branch, as a killed `dvc exp run` leaves it; go on with: git switch main (or your branch)"
        )
    if fault := unfit_for_queue(top.resolve()):
        return "note", fault
    return "ok", (
        f"dvc {metadata.version('dvc')}, profile {params.profile} from {params.source}, budget {params.budget:g}"
    )


def unfit_for_queue(top: Path) -> str | None:
    """Why DVC's queue, which writes paths as ASCII, fails in a folder; None where it does not."""
    if str(top).isascii():
        return None
    return (
        f"found the folder {str(top)!a}; `dvc queue start` and `dvc exp run --temp` fail in it; "
        "allowed: ASCII letters"
    )


def remote(top: Path) -> Checked:
    """The default DVC remote, where `dvc push` puts results."""
    config = ConfigParser()
    for name in ("config", "config.local"):
        config.read(top / ".dvc" / name)
    name = config.get("core", "remote", fallback=None)
    url = config.get(f"'remote \"{name}\"'", "url", fallback=None)
    if url is None:
        return (
            "note",
            "no default remote; dvc push and dvc pull need one: dvc remote add --default NAME PLACE",
        )
    if "://" in url:
        return "ok", f"{name}: {url} (not asked)"
    folder = (top / ".dvc" / url).resolve()
    return "ok", f"{name}: {folder}" + ("" if folder.is_dir() else ", made by the first dvc push")


def bucket(top: Path) -> Checked:
    """Whether the artifact bucket answers, and may be listed."""
    section = _params(top).artifacts
    from stages.artifacts.client import Store
    from stages.artifacts.listing import listed

    where = f"s3://{section.bucket}"
    try:
        store = Store(section.model_copy(update={"timeout": min(TIMEOUT, section.timeout)}))
        found, _ = listed(store, most=1)
    except InputError as error:
        return "note", f"{str(error).split('; ')[0]}; source: s3 needs it, embedded and local do not"
    return "ok", f"{where}: answers, " + (
        "may be listed" if found else "holds nothing under artifacts.prefix"
    )


def _params(top: Path):
    from stages.core.settings.params import load_params

    return load_params(top / "params.yaml")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


if __name__ == "__main__":
    command(main)
