"""Images are decoded once: kept, shared between processes, made anew when anything changes, never half written."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import miniatures as mini
import psutil
import pytest
import torch

from stages.core.images import kept
from stages.core.images.decoding import IMAGES_AT_A_TIME, Decoder, Stream, ahead
from stages.core.images.load import load_images
from stages.core.runtime.cache import cache_folder, identity
from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Data

CLASSES = tuple("abcdefghij")  # 40 train images, 20 test images
DATA = Data(kind="folder", key="x.zip", size=16, calibration=0.5)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "FEWEST", 4)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    mini.pack(tmp_path / "x.zip", mini.folder(CLASSES))
    return tmp_path


@pytest.fixture
def count(monkeypatch):
    """How many images were decoded since the last call."""
    calls = []
    one = Decoder._one
    monkeypatch.setattr(Decoder, "_one", lambda self, name: (calls.append(name), one(self, name))[1])

    def take():
        found = len(calls)
        calls.clear()
        return found

    return take


def same(a, b):
    assert torch.equal(a.images[:], b.images[:])
    assert a.classes == b.classes
    assert (a.labels is None) == (b.labels is None)
    assert a.labels is None or torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
def test_a_second_call_decodes_nothing_and_gives_the_same(root, count, split):
    first = load_images(DATA, split, root)
    assert count() == 20
    same(first, load_images(DATA, split, root))
    assert count() == 0


def test_what_is_kept_serves_every_smaller_limit_and_nothing_larger(root, count):
    whole = load_images(DATA, "train", root, limit=10)
    count()
    same(load_images(DATA, "train", root, limit=3), decoded_slice(whole, 3))
    assert count() == 0
    assert len(load_images(DATA, "train", root)) == 20
    assert count() == 20
    assert len(load_images(DATA, "train", root, limit=1000)) == 20
    assert count() == 0
    kept = [path.parent.name for path in cache_folder().rglob("images.npy")]
    assert kept == ["20"]  # the smaller one is gone


def decoded_slice(images, limit):
    return type(images)(images.images[:limit], images.labels[:limit], images.classes)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 8},
        {"resize": 20},
        {"view": "inverted"},
        {"channels": 1},
        {"calibration": 0.25},
        {"classes": ["a", "c"]},
    ],
)
def test_other_settings_are_other_images(root, count, changes):
    load_images(DATA, "train", root)
    count()
    load_images(DATA.model_copy(update=changes), "train", root)
    assert count() > 0


def test_normalisation_does_not_matter(root, count):
    load_images(DATA, "train", root)
    count()
    load_images(DATA.model_copy(update={"mean": [0.1], "std": [0.2]}), "train", root)
    assert count() == 0


def test_another_file_of_the_same_name_and_size_is_decoded_anew(root, count):
    one = load_images(DATA, "test", root)
    count()
    files = mini.folder(CLASSES)
    name, other = "test/a/0.jpg", "test/b/0.jpg"
    files[name], files[other] = files[other], files[name]
    size = (root / "x.zip").stat().st_size
    mini.pack(root / "x.zip", files)
    assert (root / "x.zip").stat().st_size == size
    two = load_images(DATA, "test", root)
    assert count() == 20
    assert not torch.equal(one.images, two.images)


def test_a_copy_in_another_place_needs_no_decoding(root, count, tmp_path):
    first = load_images(DATA, "test", root)
    count()
    (tmp_path / "elsewhere").mkdir()
    shutil.copyfile(root / "x.zip", tmp_path / "elsewhere/x.zip")
    same(first, load_images(DATA, "test", tmp_path / "elsewhere"))
    assert count() == 0


def test_a_files_hash_is_computed_once_for_each_version(root, monkeypatch):
    from stages.core.runtime import cache

    calls = []
    monkeypatch.setattr(cache, "_sha256", lambda path: calls.append(path) or "0" * 64)
    identity(root / "x.zip")
    identity(root / "x.zip")
    assert len(calls) == 2  # a file that changed just now can change again unseen
    calls.clear()
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    for _ in range(3):
        identity(root / "x.zip")
    assert len(calls) == 1
    os.utime(root / "x.zip", (1, 1))
    identity(root / "x.zip")
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["images.npy", "index.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_cache_is_made_again(root, count, name, share):
    first = load_images(DATA, "train", root)
    whole = first.images.clone()
    count()
    path = next(cache_folder().rglob(name))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert torch.equal(load_images(DATA, "train", root).images, whole)
    assert count() == 20


def test_changing_the_images_leaves_the_cache_alone(root):
    images = load_images(DATA, "train", root).images
    before = images.clone()
    images.zero_()
    assert torch.equal(load_images(DATA, "train", root).images, before)


def test_a_bad_image_leaves_nothing_behind(root):
    mini.pack(root / "x.zip", {**mini.folder(CLASSES), "train/a/2.jpg": b"none"})
    with pytest.raises(InputError, match=r"train/a/2\.jpg: not a readable image"):
        load_images(DATA.model_copy(update={"calibration": 0.0}), "train", root)
    assert not list((cache_folder() / "decoded").rglob("*.npy"))
    assert not list((cache_folder() / "decoded").rglob("making-*"))


def test_a_cache_that_cannot_be_written_costs_time_only(root, monkeypatch, count):
    kept = load_images(DATA, "train", root)
    (root / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))
    same(kept, load_images(DATA, "train", root))


def test_a_disk_that_fills_up_while_writing_costs_time_only(root, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept, "_write", full)
    assert len(load_images(DATA, "train", root)) == 20


def test_processes_at_once_give_the_same_and_decode_once(root, cache):
    code = (
        "import hashlib, sys\nfrom pathlib import Path\nfrom stages.core.images import kept\n"
        "from stages.core.images.load import load_images\nfrom stages.core.settings.profiles import Data\n"
        "kept.FEWEST = 4\n"
        "data = Data(kind='folder', key='x.zip', size=16, calibration=0.5)\n"
        f"images = load_images(data, 'train', Path({str(root)!r})).images\n"
        "sys.stdout.write(hashlib.sha256(images.numpy().tobytes()).hexdigest())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = [process.communicate(timeout=60)[0] for process in running]
    assert len(found[0]) == 64
    assert len(set(found)) == 1
    assert len(list(cache.rglob("images.npy"))) == 1


# --- where it does not fit


def test_without_room_on_disk_images_stay_in_memory(root, monkeypatch, count):
    kept = load_images(DATA, "train", root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "other"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 1000))
    found = load_images(DATA, "train", root)
    assert isinstance(found.images, torch.Tensor)
    same(kept, found)


@pytest.fixture
def streamed(root, monkeypatch):
    kept = load_images(DATA, "train", root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "other"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 1000))
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1000))
    return kept.images, load_images(DATA, "train", root).images


def test_without_memory_images_are_decoded_as_they_are_used(streamed):
    kept, stream = streamed
    assert isinstance(stream, Stream)
    assert stream.shape == kept.shape
    assert len(stream) == len(kept)
    assert torch.equal(stream[:3], kept[:3])
    chosen = torch.tensor([7, 0, 7, 19])
    assert torch.equal(stream[chosen], kept[chosen])


def test_batches_ahead_are_the_same_for_both(streamed):
    orders = torch.randperm(20).split(6)
    for images in streamed:
        found = list(ahead(images, orders))
        assert [chosen.tolist() for chosen, _ in found] == [order.tolist() for order in orders]
        assert all(torch.equal(x, streamed[0][chosen]) for chosen, x in found)
    assert list(ahead(streamed[1], [])) == []


def test_a_bad_image_in_a_stream_is_one_line(streamed, root):
    _, stream = streamed
    broken = Stream(stream.decoder, ["nothing.jpg"])
    with pytest.raises(InputError, match=r"no nothing\.jpg in it"):
        list(ahead(broken, [torch.tensor([0])]))


def test_chunks_come_in_order_however_many(monkeypatch):
    from PIL import Image

    decoder = Decoder("x", lambda name: Image.new("L", (8, 8), int(name) % 251), 8, 8, 1, "upright")
    names = [str(i) for i in range(5 * IMAGES_AT_A_TIME + 3)]
    found = torch.cat(list(decoder.chunks(names)))
    assert found[:, 0, 0, 0].tolist() == [int(name) % 251 for name in names]
