"""Files are whole or absent."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from stages.core.runtime import cache
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import (
    read_json,
    read_tensors,
    replacing,
    sweep,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).parents[3]


def test_a_file_appears_whole(tmp_path):
    write_json(tmp_path / "deep/a.json", {"b": 1})
    assert read_json(tmp_path / "deep/a.json") == {"b": 1}
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": 2}])
    assert (tmp_path / "a.csv").read_text() == "x,y\n1,2\n"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_write_that_stops_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise stop

    with pytest.raises(stop):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot be written")]
)
def test_a_full_disk_is_one_line_and_nothing_is_half_written(tmp_path, monkeypatch, number, message):
    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=message) as error:
        write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(3)})
    assert "a.safetensors" in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(4.0), "a": torch.arange(6).view(2, 3).T}
    write_tensors(tmp_path / "one.safetensors", tensors, {"k": "v"})
    write_tensors(tmp_path / "two.safetensors", tensors, {"k": "v"})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    found, metadata = read_tensors(tmp_path / "one.safetensors")
    assert metadata == {"k": "v"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_missing_and_damaged_files_are_named(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(300)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-7])
    (tmp_path / "a.json").write_text("{")
    for read, name in (
        (read_tensors, "a.safetensors"),
        (read_json, "a.json"),
        (read_tensors, "b"),
        (read_json, "b"),
    ):
        with pytest.raises(InputError, match=name) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_tensors_that_share_memory_are_written_each_as_it_is(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"whole": whole, "again": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}
    write_tensors(tmp_path / "t.safetensors", tensors)
    found, _ = read_tensors(tmp_path / "t.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


KILLED = """
import os, signal, sys
from stages.core.runtime.files import replacing
with replacing(sys.argv[1]) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
LIVING = """
import sys
from stages.core.runtime.files import replacing
with replacing(sys.argv[1]) as path:
    path.write_text("whole")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], cwd=ROOT, check=False)
    left = list(tmp_path.glob(".*.tmp"))
    assert len(left) == 2 or len(left) == 1  # the second sweeps what the first left
    words = [sys.executable, "-c", LIVING, tmp_path / "c"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as living:
        assert living.stdout.readline() == "writing\n"
        sweep.cache_clear()
        write_text(tmp_path / "d", "new")
        (theirs,) = tmp_path.glob(".*.tmp")
        assert theirs.name.startswith(".c.")
        living.communicate("\n")
    assert living.returncode == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"c": "whole", "d": "new"}


def test_git_and_dvc_leave_temporary_files_out(tmp_path):
    with replacing(tmp_path / "a.json") as path:
        name = f"reports/fit/{path.name}"
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False).returncode == 0
    assert "*.tmp" in (ROOT / ".dvcignore").read_text().split()


LIMITED = """
import resource, sys, torch
from stages.core.runtime import files
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda p: files.write_text(p, "x" * 10_000),
    lambda p: files.write_json(p, list(range(10_000))),
    lambda p: files.write_tensors(p, {"w": torch.zeros(10_000)}),
):
    try:
        write(sys.argv[1])
    except files.InputError as error:
        print(error)
"""


def test_a_file_beyond_what_the_system_allows_is_one_line_and_nothing_half(tmp_path):
    words = [sys.executable, "-c", LIMITED, tmp_path / "a"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.count("a: no space left on the device; free some and run the same again\n") == 3
    assert os.listdir(tmp_path) == []


def test_a_cache_that_can_only_be_read_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache.kept_file("x", lambda target: target.write_text("content"))

    def closed(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "mkstemp"):
        monkeypatch.setattr(tempfile if name == "mkstemp" else Path, name, closed)
    monkeypatch.setattr(os, "utime", closed)
    assert cache.kept_file("x", lambda target: pytest.fail("made again")).read_text() == "content"
    with cache.alone(path.parent) as folder:
        assert (folder / "x").read_text() == "content"
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        cache.kept_file("y", lambda target: target.write_text("content"))
