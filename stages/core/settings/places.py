"""Where a file of a profile comes from.

resnet50/cub/v1a/model.pth        in the bucket, in `own`, or made here, as `source` says
s3://bucket/folder/model.pth      whatever `source` says; with the endpoint and credentials of `artifacts`
./model.pth  ~/model.pth  /a.pth  whatever `source` says
"""

import hashlib
import posixpath
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

MODELS, DATA = Path("models/artifacts"), Path("data/artifacts")  # where they are in the workspace
OWN = Path("data/own")  # the folder in the workspace for files of the user's own

BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
BUCKET_RULE = (
    "3 to 63 small letters, digits, '.', '-', a letter or digit beside each '.' and at both ends, no address"
)
PATTERN = (
    r"^([A-Za-z0-9_][A-Za-z0-9_./-]*"
    rf"|s3://{BUCKET}/[^/].*"
    r"|(~|\.|\.\.)?/.*[^/])$"
)


def endpoint_fault(address: str) -> str | None:
    """What is wrong with an S3 endpoint, in words that hold no password; None where nothing is."""
    allowed = "allowed: null or an address such as https://host:9000"
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a host or port that is none
        whole = False
    if "@" in address:
        return (
            f"found an address with a name or password; {allowed}, and credentials as the AWS tools keep them"
        )
    if not whole or parts.query or parts.fragment or not address.isprintable() or " " in address:
        return f"found {address[:80]!r}; {allowed}"
    return None


def kind_of(place: str) -> Literal["key", "url", "path", "initial"]:
    if place.startswith("initial/"):
        return "initial"
    if place.startswith("s3://"):
        return "url"
    return "path" if place.startswith(("/", "./", "../", "~/")) else "key"


def split_url(url: str) -> tuple[str, str]:
    """s3://bucket/key -> (bucket, key)."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def file_name(place: str) -> str:
    """The name under models/artifacts or data/artifacts: a key is its own; its suffix is the place's."""
    if kind_of(place) == "url":
        return "s3/" + place.removeprefix("s3://")
    if kind_of(place) == "path":
        return f"paths/{hashlib.sha256(place.encode()).hexdigest()[:12]}/{posixpath.basename(place)}"
    return place
