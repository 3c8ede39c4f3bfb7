"""Archives as a tree of names: what is in them, and what is refused."""

import contextlib
import copy
import gzip
import io
import os
import random
import stat
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import miniatures as mini
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.images import allowance
from stages.core.images.archives import Archive
from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Limits

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


# --- cut, damaged and rewritten


PARTS = {f"{i:02}": bytes([i]) * (700 * i) for i in range(12)}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_tar_file_cut_anywhere_is_whole_or_one_line(tmp_path_factory, data):
    whole = mini.packed(PARTS, "tar")
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 1024  # the last member's last block, then the end block
    edges = list(range(0, len(whole), 512))
    size = data.draw(st.integers(0, len(whole)) | st.sampled_from(edges))
    path = tmp_path_factory.mktemp("cut") / "x.tar"
    path.write_bytes(whole[:size])
    if size < end:
        assert "x.tar: not a whole" in refused(path)
    else:
        with Archive([path]) as archive:
            assert content(archive) == PARTS


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_header_of_a_tar_file_never_loses_a_member(tmp_path_factory, data):
    whole = bytearray(mini.packed(PARTS, "tar"))
    headers = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    at = data.draw(st.integers(0, 499))
    whole[data.draw(st.sampled_from(headers)) + at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "x.tar"
    path.write_bytes(whole)
    if at in (154, 155):  # behind the digits of the checksum, which it does not cover
        with contextlib.suppress(InputError), Archive([path]) as archive:
            assert content(archive) == PARTS
    else:
        assert "x.tar: not a whole" in refused(path)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_anywhere_never_loses_or_changes_a_file(tmp_path_factory, kind, data):
    """But for what a tar file has no checksum of: the content of its members."""
    path = tmp_path_factory.mktemp("flip") / ("x.tar.gz" if kind == "tgz" else "x.zip")
    whole = bytearray(mini.packed(PARTS, kind))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        with Archive([path]) as archive:
            found = content(archive)
    except InputError:
        return
    assert found.keys() == PARTS.keys()
    assert found == PARTS or kind == "tar"


@pytest.mark.parametrize("link", [False, True])
def test_a_damaged_entry_that_is_needed_at_once_is_one_line(tmp_path, link):
    """An archive inside, and a link's target."""
    info = zipfile.ZipInfo("link" if link else "in.zip")
    info.create_system, info.compress_type = 3, zipfile.ZIP_DEFLATED
    info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(info, "target/of/it" * 9 if link else mini.packed(PARTS, "stored"))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[30 + len(info.filename) + 5] ^= 255
    (tmp_path / "x.zip").write_bytes(content)
    assert f"x.zip: {info.filename}: cannot be read" in refused(tmp_path / "x.zip")


def test_a_damaged_length_that_swallows_the_rest_of_the_list_is_one_line(tmp_path):
    path = mini.pack(tmp_path / "x.zip", PARTS, "zip")
    whole = path.read_bytes()
    first = whole.find(b"PK\x01\x02")
    for field in (28, 30, 32):  # the lengths of name, extra field and comment
        content = bytearray(whole)
        content[first + field + 1] ^= 1 << 2
        path.write_bytes(content)
        assert "x.zip: not a whole zip file" in refused(path)


def test_a_zip64_file_is_counted_too(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    with Archive([mini.pack(tmp_path / "x.zip", PARTS, "zip")]) as archive:
        assert content(archive) == PARTS


def test_what_follows_the_end_of_a_tar_file_is_not_dropped_without_a_word(tmp_path):
    (tmp_path / "x.tar").write_bytes(mini.packed({"a": b"1"}, "tar") + mini.packed({"b": b"2"}, "tar"))
    assert "content after its end, at byte 1024" in refused(tmp_path / "x.tar")


def test_an_archive_rewritten_in_place_is_read_anew(tmp_path):
    path = tmp_path / "x.tgz"
    for text in (b"one", b"two", b"six"):
        new = gzip.compress(mini.packed({"a": text}, "tar"), 0, mtime=0)
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.write(new)
        os.utime(path, ns=(10**18, 10**18))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (len(new), 10**18)
        with Archive([path]) as archive:
            assert archive.read("a") == text


# --- archives that unfold


def zeros(path, size, kind):
    """An archive of one member of zeros."""
    return mini.pack(path, {"train/a/x.png": bytes(size)}, kind)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The files in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size > 64]


@pytest.fixture
def small_free(monkeypatch):
    monkeypatch.setattr(allowance, "FREE", 1 << 20)
    monkeypatch.setattr(allowance, "FEW", 100)


@pytest.mark.parametrize("kinds", [["zip"], ["tgz"], ["tgz", "zip"], ["zip", "zip"], ["zip", "tgz"]])
@pytest.mark.usefixtures("small_free")
def test_what_unfolds_out_of_proportion_is_refused_and_removed(tmp_path, own_cache, kinds):
    path = zeros(tmp_path / "x", 8 << 20, kinds[0])
    for kind in kinds[1:]:
        inner = "inner.zip" if kinds[0] == "zip" else "inner.tgz"
        path = mini.pack(tmp_path / "x", {inner: path.read_bytes()}, kind)
    assert "unfolds to more than" in refused(path)
    assert own_cache() == []


@pytest.mark.usefixtures("small_free")
def test_what_a_refused_archive_left_in_the_cache_is_removed(tmp_path, own_cache):
    inner = mini.packed({"a.png": bytes(1000)}, "tgz")
    path = mini.pack(tmp_path / "x", {"a/inner.tgz": inner, "b/../../up": b""}, "tgz")
    assert "leaves the folder" in refused(path)
    assert own_cache() == []


@pytest.mark.parametrize("kind", ["zip", "tgz", "tar"])
@pytest.mark.usefixtures("small_free")
def test_entries_are_counted(tmp_path, kind):
    most = lambda path: 100 + path.stat().st_size // allowance.BYTES  # noqa: E731
    path = mini.pack(tmp_path / "x", {str(i): b"" for i in range(2000)}, kind)
    if kind == "tar":  # 512 bytes an entry: as large as it looks
        with Archive([path]) as archive:
            assert len(archive.names) == 2000
    else:
        assert f"more than {most(path)} entries" in refused(path)
    with pytest.raises(InputError, match="more than 10 entries"):
        Archive([path], Limits(entries=10))


def test_entries_of_archives_inside_count_too(tmp_path):
    inner = mini.packed({str(i): b"" for i in range(8)}, "tar")
    path = mini.pack(tmp_path / "x", {"a/in.tar": inner, "b/in.tar": inner}, "tar")
    Archive([path], Limits(entries=18)).close()
    with pytest.raises(InputError, match="more than 17 entries"):
        Archive([path], Limits(entries=17))


def test_entries_of_a_zip_file_that_lie_over_each_other_are_refused(tmp_path):
    path = mini.pack(tmp_path / "x.zip", {"a": random.Random(0).randbytes(5000)}, "zip")
    with zipfile.ZipFile(path, "a") as file:
        (first,) = file.filelist
        for name in "bcd":
            again = copy.copy(first)
            again.filename = again.orig_filename = name
            file.filelist.append(again)
            file.NameToInfo[name] = again
        file._didModify = True
    assert "allowed: no overlap" in refused(path)


def test_a_link_of_a_zip_file_is_short(tmp_path):
    info = zipfile.ZipInfo("a/link")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(info, "x" * 1_000_000)
    assert "link 'a/link' to 1000000 bytes; allowed: 4096" in refused(tmp_path / "x.zip")


def test_a_long_chain_of_links_takes_no_time(tmp_path):
    links = [(f"l{i}", tarfile.SYMTYPE, f"l{i + 1}") for i in range(5000)]
    path = tar(tmp_path / "x.tar", *links, ("l5000", tarfile.REGTYPE, b"end"))
    start = time.monotonic()
    with Archive([path]) as archive:
        assert archive.read("l0") == b"end"
        assert len(archive.names) == 5001
    assert time.monotonic() - start < 10


def test_diamonds_of_links_to_folders_drop_out(tmp_path):
    links = [(f"{i}/{side}", tarfile.SYMTYPE, f"../{i + 1}") for i in range(40) for side in "ab"]
    with Archive([tar(tmp_path / "x.tar", *links, ("40/x", tarfile.REGTYPE, b"1"))]) as archive:
        assert archive.names == ["40/x"]


def test_an_unpacked_file_goes_when_it_has_not_been_used_for_a_month(tmp_path, own_cache):
    one = mini.pack(tmp_path / "one.tgz", {"a": bytes(5000)})
    Archive([one]).close()
    (plain,) = [path for path in own_cache() if path.suffix == ".tar"]
    os.utime(plain, (0, 0))
    Archive([one]).close()  # used
    Archive([mini.pack(tmp_path / "two.tgz", {"b": bytes(5000)})]).close()
    assert plain in own_cache()
    os.utime(plain, (0, 0))
    Archive([mini.pack(tmp_path / "three.tgz", {"c": bytes(5000)})]).close()
    assert plain not in own_cache()
