"""What the bucket, the machine or the disk refuses: one line, in seconds, and nothing in the outputs."""

import base64
import errno
import hashlib
import io
import os
import random
import shutil
import socket
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import CHUNK, CONTENT, KEY, OTHER, digest, free_port

from stages.artifacts import bucket, checks, client
from stages.artifacts.settings import outputs
from stages.core.runtime import cache
from stages.core.runtime.errors import InputError
from stages.core.settings.params import load_params


class TestChecks:
    def test_flipped_byte(self, front, store, fetch, refused, cached):
        store.put(KEY, CONTENT)
        front.flip = 70_000
        line = refused()
        assert f"{store.bucket}/{KEY}: corrupted download (md5" in line
        assert hashlib.md5(CONTENT).hexdigest() in line
        assert cached() == []
        front.flip = None
        assert fetch() == CONTENT

    @pytest.mark.parametrize("sizes", [[len(CONTENT)], [5 << 20, 100], [5 << 20, 6 << 20, 70_000]])
    def test_flipped_byte_of_an_object_in_parts(self, sizes, front, store, fetch, refused, cached):
        content = random.Random(len(sizes)).randbytes(sum(sizes))
        store.put_in_parts(KEY, content, sizes)
        front.flip = 70_000
        assert "corrupted download (the md5 of its parts is another)" in refused()
        assert cached() == []
        front.flip = None
        assert fetch() == content

    @pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
    def test_flipped_byte_is_seen_by_a_checksum_where_there_is_no_md5(
        self, algorithm, front, store, fetch, refused
    ):
        store.client.put_object(
            Bucket=store.bucket, Key=KEY, Body=CONTENT, ACL="public-read", ChecksumAlgorithm=algorithm
        )
        front.headers = {"ETag": '"no-md5"'}
        front.flip = 70_000
        assert f"corrupted download ({algorithm.lower()} " in refused()
        front.flip = None
        assert fetch() == CONTENT

    def test_without_any_checksum_the_pin_sees_it_and_without_a_pin_a_line_says_so(
        self, front, store, fetch, refused, cached, caplog
    ):
        store.put(KEY, CONTENT)
        front.headers = {"ETag": '"no-md5"', "x-amz-checksum-crc32": None}
        front.flip, pins = 70_000, {KEY: digest(CONTENT)}
        assert f"artifacts.sha256 pins {digest(CONTENT)}" in refused(sha256=pins)
        assert cached() == []
        front.flip = None
        assert fetch(sha256=pins) == CONTENT
        shutil.rmtree(cached()[0].parent)
        assert fetch() == CONTENT
        assert f"the bucket gives nothing to check; artifacts.sha256 can pin {digest(CONTENT)}" in caplog.text

    def test_a_pin_stands_above_parts_that_a_server_counts_in_its_own_way(self, front, store, fetch):
        store.put_in_parts(KEY, CONTENT)
        front.headers = {"ETag": '"00000000000000000000000000000000-1"'}
        assert fetch(sha256={KEY: digest(CONTENT)}) == CONTENT

    @given(st.binary(min_size=1, max_size=3000), st.integers(1, 900), st.data())
    @settings(max_examples=50, deadline=None)
    def test_any_flip_is_a_difference(self, tmp_path_factory, content, part, data):
        path, count = tmp_path_factory.mktemp("sum") / "x", -(-len(content) // part)
        path.write_bytes(content)
        sizes = checks.equal_parts(len(content), part, count)
        etag = f'"{checks.etag_of_parts(path, sizes)}"'
        sums = (("crc32", base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()),)
        versions = [
            checks.Version("e", len(content), hashlib.md5(content).hexdigest(), None, ()),
            checks.Version("e", len(content), None, None, sums),
            checks.Version(etag, len(content), None, count, ()),
        ]
        flipped = bytearray(content)
        flipped[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        for version in versions:
            path.write_bytes(content)
            assert checks.difference(path, version, lambda _: sizes) is None
            path.write_bytes(flipped)
            assert checks.difference(path, version, lambda _: sizes)
            path.write_bytes(content + b"1")
            assert "bytes instead of" in checks.difference(path, version, lambda _: sizes)

    def test_parts_that_are_not_told_are_guessed(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(random.Random(0).randbytes((13 << 20) + 7))
        etag = f'"{checks.etag_of_parts(path, [8 << 20, (5 << 20) + 7])}"'
        version = checks.Version(etag, path.stat().st_size, None, 2, ())
        assert checks.difference(path, version, lambda _: None) is None
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert checks.difference(path, version, lambda _: None) == ""  # no proof either way

    def test_wrong_pin_of_a_sound_object_costs_no_second_download(self, front, store, fetch, refused):
        store.put(KEY, CONTENT)
        line = refused(sha256={KEY: digest(OTHER)})
        assert f"found sha256 {digest(CONTENT)}, artifacts.sha256 pins {digest(OTHER)}" in line
        assert fetch(sha256={KEY: digest(CONTENT)}) == CONTENT
        assert len(front.gets()) == 1


class TestRefusals:
    def test_missing_object(self, front, store, refused):
        assert f"s3://{store.bucket}/{KEY}: no such object" in refused()

    def test_missing_bucket(self, refused):
        assert "s3://not-there: no such bucket" in refused(bucket="not-there")

    def test_private_object(self, store, refused):
        store.put(KEY, CONTENT, acl="private")
        assert f"s3://{store.bucket}/{KEY}: access denied" in refused()

    @pytest.mark.usefixtures("own_settings")
    def test_no_credentials(self, store, refused):
        store.put(KEY, CONTENT)
        line = refused(anonymous=False)
        assert "no usable AWS credentials on this machine" in line
        assert "artifacts.anonymous: true" in line

    def test_refused_connection(self, refused):
        address, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
        line = refused(endpoint=address)
        assert line.startswith(f"{address}: no answer (")
        assert "Connection refused" in line
        assert time.monotonic() - start < 5

    def test_silent_endpoint(self, refused):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            address, start = f"http://127.0.0.1:{listener.getsockname()[1]}", time.monotonic()
            assert refused(endpoint=address, timeout=1.0).startswith(
                f"{address}: no answer (nothing within 1.5 s)"
            )
            assert time.monotonic() - start < 3

    @pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_endpoint_of_the_environment_that_is_no_address(self, refused, monkeypatch, variable):
        monkeypatch.setenv(variable, "localhost:9000")
        assert refused(endpoint=None).startswith(
            f"{variable}, of this machine's environment: found 'localhost:9000'"
        )

    @pytest.mark.usefixtures("own_settings")
    def test_unknown_profile_of_the_machine(self, refused, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        assert "the AWS settings of this machine cannot be used" in refused()

    def test_cache_that_cannot_be_written(self, store, refused, tmp_path):
        store.put(KEY, CONTENT)
        (tmp_path / "file").touch()
        assert "the download cache cannot be used" in refused(cache=str(tmp_path / "file"))

    def test_cache_that_can_only_be_read_is_used_for_what_it_holds(
        self, front, store, section, fetch, tmp_path, monkeypatch
    ):
        store.put(KEY, CONTENT)
        assert fetch() == CONTENT

        def closed(path, mode="r", **_):
            if str(path).startswith(str(tmp_path / "cache")) and mode != "r":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return open(path, mode, **_)

        for module in (bucket, cache):
            monkeypatch.setattr(module, "open", closed, raising=False)
        assert fetch() == CONTENT
        assert len(front.gets()) == 1
        store.put("other", CONTENT)
        with pytest.raises(InputError, match="the download cache cannot be used"):
            bucket.materialise(section(), {"other": tmp_path / "out2"})

    @pytest.mark.parametrize("key", ["a/../../b", "a/..", "a//b", "a/./b", "a/"])
    def test_key_that_leaves_its_folder(self, key, workspace):
        space = workspace("work", "s3")
        text = (space.folder / "params.yaml").read_text()
        (space.folder / "params.yaml").write_text(text.replace("digits/digits.safetensors", key))
        with pytest.raises(InputError, match="leaves its folder"):
            outputs(load_params(space.folder / "params.yaml").active)


class TestAnswers:
    """Servers that answer, but not as S3 does."""

    def test_empty_object(self, store, refused):
        store.put(KEY, b"")
        assert f"{store.bucket}/{KEY}: found 0 bytes; allowed: an object that is not empty" in refused()

    @pytest.mark.parametrize(
        ("length", "message"),
        [
            (None, "Content-Length"),
            ("many", "cannot be read"),
            ("-5", "Content-Length"),
            ("", "cannot be read"),
        ],
    )
    def test_length_that_is_none(self, length, message, front, store, refused):
        store.put(KEY, CONTENT)
        front.headers = {"Content-Length": length}
        line = refused()
        assert message in line or "no answer" in line or "no usable answer" in line

    @pytest.mark.parametrize("more", [1, CHUNK, 100 * CHUNK])
    def test_more_than_announced(self, more, front, store, refused, cached):
        store.put(KEY, CONTENT)
        front.headers, front.more = {"Content-Length": None}, more
        front.head_length = len(CONTENT)
        assert "the server sends more than the 787kB it announced" in refused()
        assert sum(path.stat().st_size for path in cached()) == 0

    def test_a_byte_now_and_then_is_no_answer(self, front, store, refused, monkeypatch):
        store.put(KEY, CONTENT)
        monkeypatch.setattr(bucket, "LEAST", CHUNK * 5)
        front.drip = 0.05
        start = time.monotonic()
        assert "less than 328kB a second" in refused(timeout=0.2)
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_busy_server_is_asked_again(self, status, front, store, fetch, monkeypatch):
        monkeypatch.setattr(client, "BUSY_PAUSE", 0.01)
        store.put(KEY, CONTENT)
        front.busy = [(status, 4)]
        assert fetch() == CONTENT
        assert not front.busy

    @pytest.mark.parametrize("status", [429, 503])
    def test_but_not_for_ever(self, status, front, store, refused, monkeypatch):
        monkeypatch.setattr(client, "BUSY_PAUSE", 0.01)
        store.put(KEY, CONTENT)
        front.busy = [(status, 1000)]
        assert f"the server answered {status}" in refused()

    @pytest.mark.parametrize(
        "body",
        [
            b"<?xml version='1.0' encoding='no-such'?><Error/>",
            b"<?xml version='1.0' encoding='utf-32'?><Error/>",
            b"<?xml version='1.0' encoding='ebcdic-cp-be'?><Error><Code>A</Code></Error>",
            "<Error><Code>Ungültig</Code></Error>".encode("latin1"),
            b"\xff\xfe\x00<",
            b"{}",
            b"<Error>",
            b"",
        ],
    )
    @pytest.mark.parametrize("status", [400, 403, 404])
    def test_error_bodies_of_any_encoding(self, status, body, front, store, refused):
        front.error = (status, body)
        assert f"s3://{store.bucket}" in refused()


class TestMachine:
    """What boto3 finds on this machine and cannot use."""

    @pytest.fixture(autouse=True)
    def _fresh(self, own_settings):
        pass

    def test_bad_region(self, refused):
        line = refused(region="us east")
        assert "artifacts.region: found 'us east'; allowed: a region's name such as us-east-1" in line

    def test_missing_web_identity_file(self, store, refused, monkeypatch, tmp_path):
        store.put(KEY, CONTENT)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
        line = refused(anonymous=False)
        assert line.startswith(f"{tmp_path / 'token'}: cannot be read (No such file or directory)")
        assert "AWS_WEB_IDENTITY_TOKEN_FILE" in line

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\nx"])
    def test_a_session_token_is_never_printed(self, end, store, refused, monkeypatch):
        store.put(KEY, CONTENT, acl="private")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.setenv(name, f"hush{name}" + (end if name.endswith("TOKEN") else ""))
        line = refused(anonymous=False)
        assert "hush" not in line
        assert "hold a character that no header may have" in line

    @pytest.mark.parametrize("name", ["a..b", "with space", "a/b", "A_b" * 90])
    def test_a_bucket_name_that_boto3_refuses(self, name, section, impatient, tmp_path):
        given = section().model_copy(update={"bucket": name})
        with pytest.raises(InputError) as caught:
            bucket.materialise(given, {KEY: tmp_path / "x"})
        assert "bucket" in str(caught.value) or "access denied" in str(caught.value)


class TestFullDisk:
    def test_while_downloading(self, front, store, fetch, refused, monkeypatch):
        store.put(KEY, CONTENT)

        class Full(io.FileIO):
            def write(self, content):
                if self.tell() >= 4 * CHUNK:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(content)

        with monkeypatch.context() as patch:
            patch.setattr(
                bucket, "open", lambda path, mode: (Full if mode == "ab" else open)(path, mode), raising=False
            )
            assert "no space left on the device for the download" in refused()
        assert fetch() == CONTENT
        assert front.gets()[-1].range == f"bytes={4 * CHUNK}-"

    def test_before_downloading(self, front, store, refused, monkeypatch):
        store.put(KEY, CONTENT)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
        assert "787kB needed, 10.0B free" in refused()
        assert front.gets() == []

    def test_while_copying(self, store, refused, monkeypatch):
        store.put(KEY, CONTENT)

        def copyfile(source, target):
            with open(target, "wb") as handle:
                handle.write(CONTENT[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfile", copyfile)
        assert f"out/{KEY}: no space left on the device" in refused()
