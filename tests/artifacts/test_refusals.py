"""What the bucket, the machine or the disk refuses: one line, in seconds, and nothing in the outputs."""

import errno
import hashlib
import io
import os
import shutil
import socket
import time

import pytest
from loopback import CHUNK, CONTENT, KEY, OTHER, digest, free_port

from stages.artifacts import bucket
from stages.artifacts.__main__ import outputs
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

    def test_flipped_byte_of_an_object_without_md5_is_seen_by_the_pin(
        self, front, store, fetch, refused, cached
    ):
        store.put_in_parts(KEY, CONTENT)
        front.flip, pins = 70_000, {KEY: digest(CONTENT)}
        assert f"artifacts.sha256 pins {digest(CONTENT)}" in refused(sha256=pins)
        assert cached() == []
        front.flip = None
        assert fetch(sha256=pins) == CONTENT

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

    def test_endpoint_that_is_no_address(self, refused):
        assert "artifacts.endpoint: found 'localhost:9000'; allowed:" in refused(endpoint="localhost:9000")

    @pytest.mark.usefixtures("own_settings")
    def test_unknown_profile_of_the_machine(self, refused, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        assert "the AWS settings of this machine cannot be used" in refused()

    def test_cache_that_cannot_be_written(self, store, refused, tmp_path):
        store.put(KEY, CONTENT)
        (tmp_path / "file").touch()
        assert "the download cache cannot be used" in refused(cache=str(tmp_path / "file"))

    @pytest.mark.parametrize("key", ["a/../../b", "a/..", "a//b", "a/./b", "a/"])
    def test_key_that_leaves_its_folder(self, key, workspace):
        space = workspace("work", "s3")
        text = (space.folder / "params.yaml").read_text()
        (space.folder / "params.yaml").write_text(text.replace("digits/digits.safetensors", key))
        with pytest.raises(InputError, match="leaves its folder"):
            outputs(load_params(space.folder / "params.yaml").active)


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
