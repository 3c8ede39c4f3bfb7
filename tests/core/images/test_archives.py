"""Archives as a tree of names: what is in them, and what is refused."""

import io
import stat
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import miniatures as mini
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.images.archives import Archive
from stages.core.runtime.errors import InputError

FILES = {"a.txt": b"one", "b/c.txt": b"two" * 1000, "b/d/e.bin": bytes(range(256)) * 40, "empty": b""}
KINDS = ["zip", "stored", "tar", "tgz"]


def content(archive):
    return {name: archive.read(name) for name in archive.names}


def tar(path, *members):
    """Members: (name, type, link or content)."""
    with tarfile.open(path, "w") as file:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(value)
                file.addfile(info, io.BytesIO(value))
            else:
                info.linkname = value
                file.addfile(info)
    return path


def refused(*paths):
    with pytest.raises(InputError) as caught, Archive(paths):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_there(tmp_path, kind):
    with Archive([mini.pack(tmp_path / "x", FILES, kind)]) as archive:
        assert archive.names == sorted(FILES)
        assert content(archive) == FILES
        assert "a.txt" in archive
        with pytest.raises(InputError, match="no nothing in it"):
            archive.read("nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_at_once(tmp_path, kind):
    files = {f"{i:03}": bytes([i % 256]) * (1000 + i) for i in range(200)}
    barrier = threading.Barrier(8)

    def read(_):
        barrier.wait()
        return content(archive)

    with Archive([mini.pack(tmp_path / "x", files, kind)]) as archive, ThreadPoolExecutor(8) as pool:
        assert all(found == files for found in pool.map(read, range(8)))


@given(
    files=st.dictionaries(
        st.text("abc", min_size=1, max_size=3).map(lambda t: f"{t}.bin"),
        st.binary(max_size=900),
        min_size=1,
        max_size=5,
    ),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_archives_inside_archives_stand_for_their_content(tmp_path_factory, files, kinds):
    path = tmp_path_factory.mktemp("nested") / "x"
    inner, names = files, dict(files)
    for kind in kinds[:-1]:
        suffix = {"stored": "zip", "tgz": "tar.gz"}.get(kind, kind)
        inner = {f"deep/inner.{suffix}": mini.packed(inner, kind)}
        names = {f"deep/{name}": value for name, value in names.items()}
    with Archive([mini.pack(path, inner, kinds[-1])]) as archive:
        assert content(archive) == names


def test_several_files_are_one_tree(tmp_path):
    one = mini.pack(tmp_path / "one.zip", {"images/a": b"1"})
    two = mini.pack(tmp_path / "two.tar", {"./lists/b": b"2", "._hidden": b"", "__MACOSX/x": b""})
    (tmp_path / "three.txt").write_bytes(b"3")
    with Archive([one, two, tmp_path / "three.txt"]) as archive:
        assert content(archive) == {"images/a": b"1", "lists/b": b"2", "three.txt": b"3"}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a/../b", "..", "a\\b", "./../x"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_entries_that_leave_the_folder_are_refused(tmp_path, name, kind):
    path = mini.pack(tmp_path / "x", {"good": b"", name: b"bad"}, kind)
    assert "leaves the folder" in refused(path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["x"]


def test_so_are_entries_of_archives_inside(tmp_path):
    inner = mini.packed({"../up": b"bad"}, "tar")
    assert "leaves the folder" in refused(mini.pack(tmp_path / "x", {"a/b/inner.tar": inner}, "zip"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../up", "../../../etc/passwd"])
def test_links_that_leave_the_folder_are_refused(tmp_path, kind, target):
    assert "leaves the folder" in refused(tar(tmp_path / "x", ("a/link", kind, target)))


def test_a_link_of_a_zip_file_that_leaves_is_refused(tmp_path):
    info = zipfile.ZipInfo("a/link")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x", "w") as file:
        file.writestr(info, "../../etc/passwd")
    assert "leaves the folder" in refused(tmp_path / "x")


def test_links_inside_give_the_content_and_others_drop_out(tmp_path):
    path = tar(
        tmp_path / "x",
        ("a/file", tarfile.REGTYPE, b"content"),
        ("b/soft", tarfile.SYMTYPE, "../a/file"),
        ("b/again", tarfile.SYMTYPE, "soft"),
        ("hard", tarfile.LNKTYPE, "a/file"),
        ("nowhere", tarfile.SYMTYPE, "nothing"),
        ("round", tarfile.SYMTYPE, "round"),
        ("folder", tarfile.DIRTYPE, ""),
        ("device", tarfile.CHRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
    )
    with Archive([path]) as archive:
        assert content(archive) == dict.fromkeys(["a/file", "b/again", "b/soft", "hard"], b"content")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_a_cut_archive_is_one_line(tmp_path, kind, share):
    files = {f"{i}": bytes([i]) * 3000 for i in range(40)}
    whole = mini.packed(files, kind)
    suffix = {"stored": "zip", "tgz": "tar.gz"}.get(kind, kind)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(whole[: int(share * len(whole))])
    assert f"x.{suffix}: not a whole" in refused(path)


def test_archives_too_deep_are_refused(tmp_path):
    inner = b"end"
    for _ in range(10):
        inner = mini.packed({"x.tar": inner}, "tar")
    (tmp_path / "x.tar").write_bytes(inner)
    assert "archives inside each other" in refused(tmp_path / "x.tar")


def test_a_damaged_entry_is_one_line(tmp_path):
    path = mini.pack(tmp_path / "x.zip", {"a": b"content" * 100}, "stored")
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT", 1))
    with Archive([path]) as archive, pytest.raises(InputError, match=r"x\.zip: a: cannot be read"):
        archive.read("a")


def test_gzip_is_undone_once_for_the_same_content(tmp_path, monkeypatch):
    path = mini.pack(tmp_path / "x.tgz", FILES)
    calls = []
    gunzip = Archive._gunzip
    monkeypatch.setattr(Archive, "_gunzip", lambda *args: (calls.append(1), gunzip(*args)))
    for _ in range(2):
        with Archive([path]) as archive:
            assert content(archive) == FILES
    assert len(calls) == 1
    mini.pack(path, {**FILES, "more": b""})
    with Archive([path]) as archive:
        assert "more" in archive
    assert len(calls) == 2


def test_a_full_disk_stops_unpacking_and_leaves_nothing(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    from stages.core.runtime.cache import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    assert "no space left to unpack" in refused(mini.pack(tmp_path / "x.tgz", FILES))
    assert not [path for path in (cache_folder() / "unpacked").rglob("*") if path.suffix == ".tar"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "set XDG_CACHE_HOME" in refused(mini.pack(tmp_path / "x.tgz", FILES))
