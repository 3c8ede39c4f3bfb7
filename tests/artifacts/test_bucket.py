"""Downloads over a connection that is cut or stalled, of objects that change, into a shared cache."""

import hashlib
import os
import signal
import time

import pytest
from loopback import CHUNK, CONTENT, KEY, OTHER, digest, free_port, put_all, wait_for

from stages.artifacts import bucket
from stages.artifacts.bucket import materialise
from stages.core.settings.params import ArtifactsSection


class TestArrives:
    def test_every_object_whole_and_once(self, front, store, section, tmp_path):
        contents = {KEY: CONTENT, "digits/data.zip": OTHER}
        for key, content in contents.items():
            store.put(f"release/1/{key}", content)
        files = {key: tmp_path / "out" / key for key in contents}
        materialise(section(prefix="release/1/"), files)
        assert {key: path.read_bytes() for key, path in files.items()} == contents
        assert {p for p in (tmp_path / "out").rglob("*") if p.is_file()} == set(files.values())
        assert front.sent() == len(CONTENT) + len(OTHER)
        assert len(front.gets()) == 2

    def test_object_uploaded_in_parts(self, store, fetch):
        store.put_in_parts(KEY, CONTENT)
        assert fetch() == CONTENT

    @pytest.mark.usefixtures("own_settings")
    def test_private_object_with_credentials(self, store, fetch, monkeypatch):
        store.put(KEY, CONTENT, acl="private")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        assert fetch(anonymous=False) == CONTENT

    def test_endpoint_from_the_environment(self, front, store, fetch, monkeypatch):
        store.put(KEY, CONTENT)
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.address)
        assert fetch(endpoint=None) == CONTENT


class TestResumes:
    @pytest.mark.parametrize("stall", [False, True])
    def test_cut_connection(self, stall, front, store, fetch):
        store.put(KEY, CONTENT)
        front.cuts, front.stall = [5 * CHUNK, 3 * CHUNK], stall
        assert fetch(timeout=0.5) == CONTENT
        first, second, third = front.gets()
        assert first.range is None
        assert second.range == f"bytes={5 * CHUNK}-"
        assert third.range == f"bytes={8 * CHUNK}-"
        assert first.match == second.match == third.match == f'"{hashlib.md5(CONTENT).hexdigest()}"'
        assert front.sent() == len(CONTENT)  # nothing twice

    def test_cut_inside_a_chunk_costs_less_than_a_chunk(self, front, store, fetch):
        store.put(KEY, CONTENT)
        front.cuts = [5 * CHUNK + 1000]
        assert fetch() == CONTENT
        assert front.sent() < len(CONTENT) + CHUNK

    def test_gives_up_and_goes_on_the_next_time(self, front, store, fetch, refused):
        store.put(KEY, CONTENT)
        front.always_cut = CHUNK
        line = refused()
        assert f"{store.bucket}/{KEY}" in line
        assert "262kB of 787kB are kept, running the same again resumes" in line
        assert len(front.gets()) == bucket.ATTEMPTS
        front.always_cut = None
        assert fetch() == CONTENT
        assert front.gets()[-1].range == f"bytes={bucket.ATTEMPTS * CHUNK}-"
        assert front.sent() == len(CONTENT)

    def test_server_errors_are_tried_again_a_bounded_number_of_times(self, front, store, refused):
        store.put(KEY, CONTENT)
        front.status = 503
        assert "the connection was cut 4 times in a row (An error occurred (503)" in refused()

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
    def test_stopped_process(self, number, status, front, store, workspace, cached, tmp_path):
        space = workspace(
            "work", "s3", endpoint=front.address, bucket=store.bucket, cache=str(tmp_path / "cache")
        )
        contents = put_all(store, space)
        front.pace = 0.02
        with space.start() as process:
            wait_for(lambda: any(path.stat().st_size > 3 * CHUNK for path in cached()))
            os.kill(process.pid, number)
            assert process.wait(10) == status
        assert space.outputs() == {}
        (part,) = cached()
        kept = part.stat().st_size
        assert 3 * CHUNK < kept < len(CONTENT)
        time.sleep(0.1)  # the front may still be counting what it sent into the dead connection
        front.pace, before = 0.0, len(front.gets())
        code, log = space.run()
        assert code == 0, log
        assert space.outputs() == contents
        assert front.gets()[before].range == f"bytes={kept}-"
        assert sum(request.sent for request in front.gets()[before:]) == len(contents) * len(CONTENT) - kept


class TestChanges:
    def test_between_two_runs(self, front, store, fetch, refused, cached):
        store.put(KEY, CONTENT)
        front.always_cut = CHUNK
        refused()
        store.put(KEY, OTHER)
        front.always_cut, before = None, len(front.gets())
        assert fetch() == OTHER
        assert [request.range for request in front.gets()[before:]] == [None]
        assert len(cached()) == 1  # the old part is gone

    def test_within_a_run(self, front, store, fetch):
        store.put(KEY, CONTENT)
        front.cuts = [5 * CHUNK]
        front.before = lambda count: store.put(KEY, OTHER) if count == 1 else None
        assert fetch() == OTHER
        assert [request.range for request in front.gets()] == [None, f"bytes={5 * CHUNK}-", None]

    def test_without_end(self, front, store, refused):
        store.put(KEY, CONTENT)
        front.before = lambda count: store.put(KEY, CONTENT + bytes(count + 1))
        assert "changed 3 times while it was read" in refused()

    def test_after_it_was_cached(self, front, store, fetch):
        store.put(KEY, CONTENT)
        assert fetch() == CONTENT
        store.put(KEY, OTHER)
        assert fetch() == OTHER


class TestCache:
    def test_second_run_asks_for_the_version_alone(self, front, store, fetch):
        store.put(KEY, CONTENT)
        assert fetch() == fetch() == CONTENT
        assert [request.method for request in front.requests] == ["HEAD", "GET", "HEAD"]

    def test_pinned_and_cached_needs_no_server(self, front, store, fetch):
        store.put(KEY, CONTENT)
        fetch()
        front.requests.clear()
        store.client.delete_object(Bucket=store.bucket, Key=KEY)
        assert fetch(sha256={KEY: digest(CONTENT)}) == CONTENT
        assert front.requests == []

    def test_damaged_file_is_fetched_again(self, front, store, fetch, cached):
        store.put(KEY, CONTENT)
        fetch()
        (path,) = cached()
        path.write_bytes(OTHER)
        assert fetch() == CONTENT
        assert len(front.gets()) == 2

    def test_output_is_no_link_into_it(self, front, store, fetch, tmp_path):
        store.put(KEY, CONTENT)
        fetch()
        (tmp_path / "out" / KEY).write_bytes(b"edited")
        assert fetch() == CONTENT
        assert len(front.gets()) == 1

    def test_keys_of_one_name_are_kept_apart(self, store, section, tmp_path):
        store.put("a/model", CONTENT)
        store.put("b/model", OTHER)
        files = {key: tmp_path / "out" / key for key in ("a/model", "b/model")}
        materialise(section(), files)
        assert [path.read_bytes() for path in files.values()] == [CONTENT, OTHER]

    def test_two_processes_share_one_download(self, front, store, workspace, tmp_path):
        where = {"endpoint": front.address, "bucket": store.bucket, "cache": str(tmp_path / "cache")}
        spaces = [workspace(name, "s3", **where) for name in ("one", "two")]
        contents = put_all(store, spaces[0])
        front.pace = 0.02
        processes = [space.start() for space in spaces]
        for process in processes:
            _, log = process.communicate(timeout=30)
            assert process.returncode == 0, log
        assert [space.outputs() for space in spaces] == [contents, contents]
        assert len(front.gets()) == len(contents)

    def test_place(self, monkeypatch, tmp_path):
        section = ArtifactsSection(bucket="some-bucket")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        assert str(bucket.download_cache(section)) == "/home/someone/.cache/pleas-merging"
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert str(bucket.download_cache(section)) == "/caches/pleas-merging"
        chosen = ArtifactsSection(bucket="some-bucket", cache="~/elsewhere")
        assert str(bucket.download_cache(chosen)) == "/home/someone/elsewhere"


class TestStage:
    def test_as_a_user_runs_it(self, front, store, workspace):
        space = workspace("work", "s3", endpoint=front.address, bucket=store.bucket)
        contents = put_all(store, space)
        stale = space.folder / "models/artifacts/older/model.safetensors"
        stale.parent.mkdir(parents=True)
        stale.touch()
        code, log = space.run()
        assert code == 0, log
        assert space.outputs() == contents
        assert not stale.parent.exists()
        paths = [request.path for request in front.gets()]
        assert len(paths) == len(set(paths)) == len(contents)  # a shared data set once

    def test_unreachable_endpoint(self, workspace):
        space = workspace("work", "s3", endpoint=f"http://127.0.0.1:{free_port()}")
        start = time.monotonic()
        code, log = space.run()
        assert time.monotonic() - start < 10
        assert code == 1
        assert log.splitlines()[-1].startswith("error: http://127.0.0.1:")
        assert "Traceback" not in log
        assert space.outputs() == {}
