"""An S3 server that misbehaves, in every combination of its ways to fail.

Good: the object's own bytes, or one line and no output; in time.
"""

import contextlib
import functools
import logging
import os
import random
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from loopback import CHUNK, CONTENT, KEY, Front, Store
from moto.server import ThreadedMotoServer

from stages.artifacts import bucket, client
from stages.core.settings.params import ArtifactsSection
from tests.campaigns.rule import Bad, held

CLEAN = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "secret"}


@functools.cache
def store() -> tuple[Store, int]:
    """A bucket with one object, on a server that ends with the process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    with mock.patch.dict(os.environ, CLEAN):
        made = Store(port)
        made.put(KEY, CONTENT)
    return made, port


@contextlib.contextmanager
def listening(front: Front) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            front.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    listener.handle_error = lambda *_: None
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        front.done.set()
        listener.shutdown()
        listener.server_close()


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    made, port = store()
    cache, path = folder / "cache", folder / "out" / KEY
    for old in (cache, folder / "out"):
        shutil.rmtree(old, ignore_errors=True)
    front = Front(port, **_ways(draw))
    with listening(front) as address, mock.patch.dict(os.environ, CLEAN), contextlib.ExitStack() as stack:
        for module, name in ((bucket, "PAUSE"), (client, "BUSY_PAUSE")):
            stack.enter_context(mock.patch.object(module, name, 0.01))
        section = ArtifactsSection(bucket=made.bucket, endpoint=address, cache=str(cache), timeout=1.0)
        outcome, line = held(lambda: bucket.materialise(section, {KEY: path}))
    if outcome == "refused":
        if [p for p in (folder / "out").rglob("*") if p.is_file()]:
            raise Bad(f"an output although it was refused: {line}")
        if any(word in line for word in ("secret", "Authorization", "Signature")):
            raise Bad(f"a secret in {line}")
    elif path.read_bytes() != CONTENT:
        raise Bad("other bytes than the object's")
    return outcome


BODIES = (b"", b"<", b"\xff\xfe", b"<Error/>", b"x" * 9000)
TAGS = (None, '""', '"x"', *(f'"{"0" * 32}{parts}"' for parts in ("", "-3", "-x")))
LENGTHS = (None, "", "x", "-1", "0", "1", "1e3", str(len(CONTENT) - 1), str(len(CONTENT) + 1), "9" * 30)


def _ways(draw: random.Random) -> dict:
    """Fields of a Front."""
    every = {
        "cuts": lambda: [draw.randrange(len(CONTENT)) for _ in range(draw.randrange(1, 4))],
        "always_cut": lambda: draw.choice([0, 1, CHUNK, len(CONTENT) - 1]),
        "flip": lambda: draw.randrange(len(CONTENT)),
        "status": lambda: draw.choice([204, 206, 301, 304, 400, 403, 404, 416, 500, 503]),
        "error": lambda: (draw.choice([400, 403, 404, 500]), draw.choice(BODIES)),
        "busy": lambda: [(draw.choice([429, 500, 503]), draw.randrange(1, 4))],
        "headers": lambda: {"Content-Length": draw.choice(LENGTHS)} if draw.random() < 0.5 else {
            "ETag": draw.choice(TAGS)},
        "head_length": lambda: draw.choice([0, 1, len(CONTENT) - 1, len(CONTENT) + 1, 2**50]),
        "more": lambda: draw.choice([1, 1000, CHUNK]),
    }  # fmt: skip
    return {name: every[name]() for name in draw.sample(sorted(every), draw.choice([1, 1, 2, 3]))}
