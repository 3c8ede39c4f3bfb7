"""What the bucket holds: in pages, within bounds, without credentials; and what is nearest to a key it has not."""

import socket
import time

import pytest
from loopback import KEY, put_all

from stages.artifacts import listing
from stages.artifacts.__main__ import show
from stages.artifacts.client import Store
from stages.artifacts.listing import Entry, closest, listed, nearest
from stages.core.runtime.errors import InputError

LISTING = (
    b"<ListBucketResult><Name>b</Name><IsTruncated>%b</IsTruncated><Contents>%b</Contents></ListBucketResult>"
)


@pytest.fixture
def public(store):
    """A bucket that anyone may list."""
    store.client.put_bucket_acl(Bucket=store.bucket, ACL="public-read")
    return store


class TestListed:
    def test_every_key_in_order_over_several_pages(self, front, public, section, monkeypatch):
        monkeypatch.setattr(listing, "KEYS_A_PAGE", 3)
        for number in range(8):
            public.put(f"a/{number}", bytes(number))
        assert listed(Store(section())) == ([Entry(f"a/{n}", n) for n in range(8)], False)
        pages = [request.path for request in front.gets()]
        assert len(pages) == 3
        assert all("max-keys=3" in page for page in pages)

    def test_no_more_is_asked_for_than_shown(self, front, public, section, monkeypatch):
        monkeypatch.setattr(listing, "KEYS_A_PAGE", 2)
        for number in range(9):
            public.put(f"a/{number}", b"")
        found, more = listed(Store(section()), most=3)
        assert ([entry.key for entry in found], more) == (["a/0", "a/1", "a/2"], True)
        assert len(front.gets()) == 2

    def test_prefixes(self, public, section):
        for key in ("release/rn18/cub", "release/rn50/cub", "other/rn18"):
            public.put(key, b"1")
        found, _ = listed(Store(section(prefix="release/")), "rn18")
        assert found == [Entry("rn18/cub", 1)]
        assert [e.key for e in listed(Store(section(prefix="release/")))[0]] == ["rn18/cub", "rn50/cub"]

    @pytest.mark.usefixtures("public")
    def test_empty(self, section):
        assert listed(Store(section())) == ([], False)

    def test_a_bucket_that_may_not_be_listed(self, front, section):
        front.status = 403
        with pytest.raises(InputError, match="access denied"):
            listed(Store(section()))

    def test_missing_bucket(self, section):
        with pytest.raises(InputError, match="s3://not-there: no such bucket"):
            listed(Store(section(bucket="not-there")))

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>sign in</html>",
            LISTING % (b"true", b"<Key>a</Key><Size>1</Size>"),  # and no way to the rest
            LISTING % (b"false", b"<Key>a</Key>"),
            LISTING % (b"false", b"<Size>1</Size>"),
            LISTING % (b"false", b"<Key>a</Key><Size>-1</Size>"),
        ],
    )
    def test_an_answer_that_is_no_list(self, front, section, body):
        front.error = 200, body
        with pytest.raises(
            InputError, match=r"answers with what is no list of keys; artifacts.endpoint must be"
        ):
            listed(Store(section()))

    def test_silent_endpoint(self, section):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            start, address = time.monotonic(), f"http://127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(InputError, match="no answer"):
                listed(Store(section(endpoint=address, timeout=0.5)))
            assert time.monotonic() - start < 3


class TestNearest:
    KEYS = ("rn18/cub/v1a/model.pth", "rn50/cub/v1a/model.pth", "cub/CUB_200_2011.tgz", "notes.txt")

    @pytest.mark.parametrize(
        ("key", "best"),
        [
            ("resnet18/cub/v1a/model.pth", "rn18/cub/v1a/model.pth"),
            ("data/CUB_200_2011.tar.gz", "cub/CUB_200_2011.tgz"),
            ("rn50/cub/v1b/model.pth", "rn50/cub/v1a/model.pth"),
        ],
    )
    def test_the_likeliest_comes_first(self, key, best):
        assert nearest(key, self.KEYS)[0] == best

    def test_nothing_is_like_it(self):
        assert nearest("0123456789", ["xyz", "qqq"]) == []

    def test_a_missing_key_names_them(self, public, refused):
        public.put("resnet/modell.safetensors", b"1")
        public.put("elsewhere", b"1")
        line = refused()
        assert f"s3://{public.bucket}/{KEY}: no such object" in line
        assert "closest keys there: resnet/modell.safetensors; see python -m stages.artifacts list" in line

    def test_where_the_bucket_may_not_be_listed_that_is_said(self, front, section):
        front.status = 403
        assert "what it holds is not known" in closest(Store(section()), KEY)


class TestCommand:
    def test_keys_sizes_and_profiles(self, front, public, workspace, capsys, monkeypatch):
        space = workspace("work", "s3", endpoint=front.address, bucket=public.bucket)
        put_all(public, space)
        public.put("rn18/cub/v1a/model.pt", b"")
        (space.folder / "published.yaml").write_text(PUBLISHED)
        monkeypatch.chdir(space.folder)
        show("list")
        text = capsys.readouterr().out
        assert text.startswith(f"s3://{public.bucket}/*: 5 objects, 3.15MB\n")
        rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
        assert "787kB" in rows["digits/digits.safetensors"]
        assert "digits, digits_four, digits_inverted, digits_split" in rows["digits/digits.safetensors"]
        assert rows["rn18/cub/v1a/model.pt"].split()[1:] == ["0.00B", "-"]
        assert rows["rn18/cub/v1a/model.pth"].split()[1:] == ["birds", "rn18/cub/v1a/model.pt"]
        assert "cub/images.tgz" in rows
        show("list", "photographs/")
        assert "photographs/*: 1 object, 787kB\n" in capsys.readouterr().out

    def test_a_key_cannot_move_the_cursor(self, front, section):
        key = b"<Key>a%1B%5B2Jb%0Ac</Key><Size>1</Size>"
        front.error = (
            200,
            LISTING % (b"false</IsTruncated><EncodingType>url</EncodingType><IsTruncated>false", key),
        )
        shown = listing.table(Store(section()), "", {}, {})
        assert r"a\x1b[2Jb\nc" in shown

    @pytest.mark.parametrize("prefix", ["a\nb", "\x1b[2J", "é" * 600, "\udc80"])
    def test_a_prefix_that_is_none(self, prefix):
        with pytest.raises(
            InputError, match=r"artifacts list: found a prefix .* allowed: printable, at most 1024"
        ):
            show("list", prefix)

    @pytest.mark.parametrize("words", [("lst",), ("list", "a", "b"), ("list", "--all")])
    def test_other_words(self, words):
        with pytest.raises(InputError, match=r"artifacts: found .*; allowed: nothing, or list"):
            show(*words)


PUBLISHED = """
profiles:
  birds:
    architecture: {name: resnet18, arguments: {classes: 2}}
    labels: shared
    tasks:
      a: &a
        checkpoint: rn18/cub/v1a/model.pth
        data: {kind: cub, key: cub/images.tgz, size: 32}
      b: *a
    finetune: {epochs: 0}
"""
