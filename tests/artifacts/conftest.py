"""An S3 server, a front before it, a workspace; and one object that is fetched, or refused, in every way."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from loopback import KEY, Front, Store, Workspace
from moto.server import ThreadedMotoServer

from stages.artifacts import bucket, client
from stages.core.runtime.errors import InputError
from stages.core.settings.params import ArtifactsSection


@pytest.fixture
def clean_machine(tmp_path, monkeypatch):
    """A machine without AWS settings, credentials, proxies or an own cache folder."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy") or name == "XDG_CACHE_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # asked for beyond loopback


@pytest.fixture(scope="session")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def front(server):
    """A front on a free port."""
    front = Front(server)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            front.answer(self)

        def do_HEAD(self):
            front.answer(self)

        def log_message(self, *_):
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    front.address = f"http://127.0.0.1:{listener.server_port}"
    yield front
    front.done.set()
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def store(clean_machine, server):
    return Store(server)


@pytest.fixture
def section(clean_machine, front, store, tmp_path):
    """The artifacts section of params.yaml for this test's bucket behind the front, with changes."""

    def make(**changes) -> ArtifactsSection:
        values = {"bucket": store.bucket, "endpoint": front.address, "cache": str(tmp_path / "cache")}
        return ArtifactsSection(**{**values, "timeout": 5.0, **changes})

    return make


@pytest.fixture
def workspace(clean_machine, tmp_path):
    def make(name: str, source: str, **artifacts) -> Workspace:
        return Workspace(tmp_path / name, source, artifacts)

    return make


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(bucket, "PAUSE", 0.01)
    monkeypatch.setattr(client, "BUSY_PAUSE", 0.01)


@pytest.fixture
def own_settings(monkeypatch):
    """Let boto3 read the machine's settings anew: it keeps what it found between two tests."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


@pytest.fixture
def fetch(section, impatient, tmp_path):
    """Materialise KEY; returns its bytes."""

    def run(**changes) -> bytes:
        path = tmp_path / "out" / KEY
        bucket.materialise(section(**changes), {KEY: path})
        return path.read_bytes()

    return run


@pytest.fixture
def refused(fetch, tmp_path):
    """Materialise KEY, which must fail in one line and leave no output; returns the line."""

    def run(**changes) -> str:
        with pytest.raises(InputError) as caught:
            fetch(**changes)
        line = str(caught.value)
        assert "\n" not in line
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return line

    return run


@pytest.fixture
def cached(tmp_path):
    """The downloads in the cache."""

    def run() -> list:
        return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "lock"]

    return run
