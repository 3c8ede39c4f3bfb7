"""Loopback: a front that fails on purpose, a bucket behind it, and a workspace as a user has it."""

import hashlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import yaml

from stages.artifacts.settings import outputs
from stages.core.settings.params import load_params

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 1 << 16
KEY = "resnet/model.safetensors"
CONTENT = random.Random(0).randbytes(12 * CHUNK + 345)
OTHER = random.Random(1).randbytes(9 * CHUNK + 1)


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    match: str | None
    sent: int = 0  # bytes of the body


@dataclass
class Front:
    """Passes requests on to the S3 server; every field is a way to fail."""

    port: int  # of the server behind
    address: str = ""  # the front's own endpoint
    requests: list[Request] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)  # bytes after which the next GETs of an object end
    always_cut: int | None = None
    stall: bool = False  # a cut keeps the connection open and silent
    flip: int | None = None  # the byte that arrives inverted
    pace: float = 0.0  # seconds per chunk
    status: int | None = None  # answer every GET of an object so
    error: tuple[int, bytes] | None = None  # answer everything with this status and body
    busy: list[tuple[int, int]] = field(default_factory=list)  # (status, how often) before any other answer
    headers: dict[str, str | None] = field(default_factory=dict)  # in place of the server's; None: left out
    head_length: int | None = None  # the Content-Length of HEAD all the same
    more: int = 0  # bytes behind the body
    drip: float | None = None  # seconds between single bytes
    before: Callable[[int], None] = lambda count: None  # called with the number of object GETs so far
    done: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]

    def sent(self) -> int:
        return sum(request.sent for request in self.gets())

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(
            handler.command, handler.path, handler.headers.get("Range"), handler.headers.get("If-Match")
        )
        if request.method == "GET":
            self.before(len(self.gets()))
        self.requests.append(request)
        if request.method == "GET" and self.status:
            handler.send_error(self.status)
            return
        if self.busy:
            (status, times), *rest = self.busy
            self.busy = [(status, times - 1), *rest] if times > 1 else rest
            handler.send_error(status)
            return
        if self.error:
            status, body = self.error
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            if request.method == "GET":
                handler.wfile.write(body)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        asked = {
            name: v for name, v in handler.headers.items() if name != "If-Match" or "ETag" not in self.headers
        }
        upstream.request(handler.command, handler.path, headers=asked)
        found = upstream.getresponse()
        body = bytearray(found.read())
        upstream.close()
        handler.send_response(found.status)
        changed = {name.lower(): value for name, value in self.headers.items()}
        if request.method == "HEAD" and self.head_length is not None:
            changed["content-length"] = str(self.head_length)
        for name, value in found.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date", *changed):
                handler.send_header(name, value)
        for name, value in changed.items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        if request.method == "GET" and found.status < 300:
            self._send(handler, request, body)
        else:
            handler.wfile.write(body)

    def _send(self, handler: BaseHTTPRequestHandler, request: Request, body: bytearray) -> None:
        if self.flip is not None:
            body[self.flip] ^= 0xFF
        body += bytes(self.more)
        if self.drip is not None:
            for at in range(len(body)):
                try:
                    handler.wfile.write(body[at : at + 1])
                except OSError:
                    return
                if self.done.wait(self.drip):
                    return
        end = self.cuts.pop(0) if self.cuts else self.always_cut
        for start in range(0, len(body[:end]), CHUNK):
            piece = body[:end][start : start + CHUNK]
            try:
                handler.wfile.write(piece)
            except OSError:  # the client is gone
                return
            request.sent += len(piece)
            time.sleep(self.pace)
        if end is not None and self.stall:
            self.done.wait(5)


class Store:
    """A bucket of its own for one test, filled through the server's own door."""

    def __init__(self, port: int):
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="owner",
            aws_secret_access_key="secret",
        )
        self.bucket = f"test-{uuid.uuid4().hex[:16]}"
        self.client.create_bucket(Bucket=self.bucket)

    def put(self, key: str, content: bytes, acl: str = "public-read") -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content, ACL=acl)

    def put_in_parts(self, key: str, content: bytes, sizes: Sequence[int] | None = None) -> None:
        """An object whose ETag is no md5; by default of one part."""
        where = {"Bucket": self.bucket, "Key": key}
        upload = self.client.create_multipart_upload(**where, ACL="public-read")["UploadId"]
        done, start = [], 0
        for number, size in enumerate(sizes or [len(content)], 1):
            body = content[start : start + size]
            part = self.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            done.append({"PartNumber": number, "ETag": part["ETag"]})
            start += size
        self.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": done})


class Workspace:
    """A folder with a params.yaml, where `python -m stages.artifacts` is run as a user does."""

    def __init__(self, folder: Path, source: str, artifacts: dict):
        folder.mkdir()
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params.update(source=source, profile="digits")
        params["artifacts"].update(artifacts)
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        self.folder = folder

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.artifacts"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self) -> tuple[int, str]:
        """Exit status and stderr."""
        with self.start() as process:
            _, log = process.communicate(timeout=30)
            return process.returncode, log

    def outputs(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for top in ("models", "data/artifacts")
            for path in (self.folder / top).rglob("*")
            if path.is_file()
        }


def put_all(store: Store, space: Workspace) -> dict[str, bytes]:
    """Fill the bucket with every key of the workspace's profile; what the stage must write."""
    files = outputs(load_params(space.folder / "params.yaml").active)
    for key in files:
        store.put(key, CONTENT)
    return {path.as_posix(): CONTENT for path in files.values()}


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
