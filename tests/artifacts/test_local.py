"""`source: local`: files of the user's own, and folders packed to the same bytes every time."""

import errno
import os
import zipfile

import pytest

from stages.artifacts import local
from stages.artifacts.local import materialise
from stages.artifacts.settings import outputs
from stages.core.runtime.errors import InputError
from stages.core.settings.params import load_params

HOMES_OF = {"birds.tgz": "Birds from https://birds.org"}
IMAGES = {
    "train/cat/a.jpg": b"1",
    "train/dog/ä.jpg": b"22" * 5000,
    "test/cat/b.jpg": b"",
    "test/dog/c.jpg": b"4",
}


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


@pytest.fixture
def take(own, tmp_path):
    """Materialise keys into tmp_path/out; returns the path of the last."""

    def run(*keys: str):
        files = {key: tmp_path / "out" / key for key in keys}
        materialise(files, HOMES_OF, own)
        return files[keys[-1]]

    return run


@pytest.fixture
def refused(take, tmp_path):
    """Materialise, which must fail in one line and write nothing; returns the line."""

    def run(*keys: str) -> str:
        with pytest.raises(InputError) as caught:
            take(*keys)
        assert "\n" not in str(caught.value)
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return str(caught.value)

    return run


def fill(folder, files=IMAGES, time=1_600_000_000):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        os.utime(folder / name, (time, time))


def test_files_are_copied(own, take, tmp_path):
    fill(own, {"resnet/model.pt": b"weights", "birds.zip": b"a zip file", "birds/train/a/1.jpg": b"ignored"})
    take("resnet/model.pt", "birds.zip")
    assert (tmp_path / "out/resnet/model.pt").read_bytes() == b"weights"
    assert (tmp_path / "out/birds.zip").read_bytes() == b"a zip file"  # the file goes before the folder


def test_folder_is_packed(own, take):
    fill(own / "data/birds")
    with zipfile.ZipFile(take("data/birds.zip")) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == IMAGES
        assert archive.namelist() == sorted(IMAGES)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_same_folder_same_bytes(own, take):
    """Neither the order of creation, nor times, nor modes, nor hidden files reach the archive."""
    fill(own / "one")
    fill(own / "two", dict(reversed(IMAGES.items())), time=1_700_000_000)
    (own / "two/train/cat/a.jpg").chmod(0o600)
    fill(own / "two", {".DS_Store": b"x", "train/.cache/y": b"y"})
    assert take("one.zip").read_bytes() == take("two.zip").read_bytes() == take("one.zip").read_bytes()


def test_other_content_other_bytes(own, take):
    fill(own / "one")
    fill(own / "two", {**IMAGES, "test/dog/c.jpg": b"5"})
    assert take("one.zip").read_bytes() != take("two.zip").read_bytes()


def test_linked_folder_is_followed(own, take, tmp_path):
    fill(tmp_path / "elsewhere")
    (own / "birds").symlink_to(tmp_path / "elsewhere")
    with zipfile.ZipFile(take("birds.zip")) as archive:
        assert archive.namelist() == sorted(IMAGES)


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"nothing: no such folder; source: local takes from it a, b\.zip"):
        materialise({"a": tmp_path / "a", "b.zip": tmp_path / "b.zip"}, {}, tmp_path / "nothing")


def test_missing_file_writes_nothing(own, refused):
    fill(own, {"here.pt": b"weights"})
    assert f"{own}/away.pt: no such file" in refused("here.pt", "away.pt")


def test_missing_archive_names_the_folder_too(own, refused):
    assert (
        f"{own}/birds.zip: no such file; put it there, or its content in the folder {own}/birds"
        in refused("birds.zip")
    )


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_folder_stands_for_any_archive(own, take, suffix):
    fill(own / "birds")
    with zipfile.ZipFile(take(f"birds{suffix}")) as archive:
        assert archive.namelist() == sorted(IMAGES)


def test_what_is_missing_says_where_to_get_it(own, refused):
    assert "put it there (Birds from https://birds.org), or its content in" in refused("birds.tgz")


def test_empty_folder(own, refused):
    (own / "birds/train/cat").mkdir(parents=True)
    assert f"{own}/birds: empty folder" in refused("birds.zip")


def test_folder_in_place_of_a_file(own, refused):
    (own / "model.pt").mkdir()
    assert "found a folder; allowed: a file" in refused("model.pt")


def test_link_in_a_circle(own, refused):
    fill(own / "birds")
    (own / "birds/train/again").symlink_to(own / "birds")
    assert "birds/train/again: a link to a folder that contains it" in refused("birds.zip")


def test_broken_link(own, refused):
    fill(own / "birds")
    (own / "birds/train/cat/z.jpg").symlink_to(own / "nowhere")
    assert "z.jpg: neither a file nor a folder" in refused("birds.zip")


def test_name_that_is_no_text(own, refused):
    fill(own / "birds")
    os.close(os.open(os.fsencode(own) + b"/birds/train/cat/\xff.jpg", os.O_CREAT | os.O_WRONLY))
    assert "allowed: printable names" in refused("birds.zip")


@pytest.mark.parametrize("key", ["model.pt", "birds.zip"])
def test_unreadable_file(key, own, refused, monkeypatch):
    fill(own, {"model.pt": b"weights", "birds/train/cat/a.jpg": b"1"})

    def denied(path, mode):  # a mode of 0 would not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(local, "open", denied, raising=False)
    assert "cannot be read (Permission denied)" in refused(key)


def test_as_a_user_runs_it(workspace):
    space = workspace("work", "local")
    code, log = space.run()
    assert code == 1
    assert log.splitlines()[-1].startswith("error: data/own: no such folder")
    files = outputs(load_params(space.folder / "params.yaml").active)
    fill(space.folder / "data/own", dict.fromkeys(files, b"content"))
    code, log = space.run()
    assert code == 0, log
    assert space.outputs() == {path.as_posix(): b"content" for path in files.values()}


def test_files_of_an_image_folder_that_no_stage_reads_are_said_once(own, tmp_path, caplog):
    files = {"first.zip": tmp_path / "out/first.zip", "birds.tgz": tmp_path / "out/birds.tgz"}
    for key in files:
        fill(
            own / key.partition(".")[0],
            {**IMAGES, "train/cat/5.HEIC": b"5", "val/cat/6.png": b"6", "a.txt": b"7"},
        )
    materialise(files, HOMES_OF, own, {"first.zip"})
    (line,) = caplog.messages
    assert line == (
        "first.zip: passed over 3 files, not .jpg .jpeg .png .bmp .webp .gif in train/ or test/: "
        "a.txt, train/cat/5.HEIC, ... (3)"
    )
    caplog.clear()
    fill(own / "second")
    materialise({"second.zip": tmp_path / "out/second.zip"}, HOMES_OF, own, {"second.zip"})
    assert not caplog.messages
