"""Several processes as one: the same results to rounding, the same bytes each time, and one line when one is gone."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
TOGETHER = ROOT / "tests/together.py"


def run(count, path, *rest, launch=(sys.executable,)):
    environment = {k: v for k, v in os.environ.items() if k not in ("DVC_STAGE", "WORLD_SIZE", "RANK")}
    environment |= {"PYTHONPATH": f"{ROOT}:{TOGETHER.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, str(TOGETHER), str(count), str(path), *rest],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one, two and four ranks find."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    for count in (1, 2, 4):
        done = run(count, folder / f"{count}.safetensors")
        assert done.returncode == 0, done.stderr
        results[count] = load_file(folder / f"{count}.safetensors")
    return results


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_find_what_one_finds(count, found):
    """In float64: sums in another order, through up to a hundred solves and steps."""
    one, several = found[1], found[count]
    assert one.keys() == several.keys()
    for name, own in one.items():
        torch.testing.assert_close(
            several[name], own, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
        )
    curve = one["separate refined curve"]
    assert curve[0, 1] != curve[1, 1]  # it learnt something to agree on


def test_as_many_ranks_find_the_same_bytes(found, tmp_path):
    done = run(2, tmp_path / "again.safetensors", "some")
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again.safetensors")
    assert "shared merged residual" in again
    assert all(torch.equal(own, found[2][name]) for name, own in again.items() if name in found[2])


@pytest.mark.parametrize(
    ("way", "status", "line"),
    [
        ("killed", 1, "error: rank 1: ended by SIGKILL; run the same command again\n"),
        ("refused", 1, "error: images: found none\n"),
        ("wrong", 70, "ZeroDivisionError: ours\nerror: rank 1: ended with status 70\n"),
    ],
)
def test_a_rank_that_dies_ends_all_in_seconds_with_nothing_written(way, status, line, tmp_path):
    done = run(2, tmp_path / "file.safetensors", way)
    assert time.time() - float(done.stdout) < 30  # two or three on an idle machine
    assert done.returncode == status
    assert done.stderr.endswith(line)
    assert status == 70 or done.stderr == line
    assert not list(tmp_path.iterdir())


def test_torchrun_starts_the_ranks_too(tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run(1, tmp_path / "file.safetensors", "some", launch=(*launch, f"--master-port={port}"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file.safetensors").is_file()
