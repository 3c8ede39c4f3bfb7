"""Files are whole or absent."""

import errno
import os

import pytest
import torch

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import (
    read_json,
    read_tensors,
    replacing,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)


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
