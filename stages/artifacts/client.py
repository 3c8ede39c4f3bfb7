"""Requests to an S3 endpoint, and every way they fail as one line."""

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from stages.core.runtime.errors import InputError
from stages.core.settings.params import ArtifactsSection

DEADLINE = 1.5  # of artifacts.timeout: name lookup, every address and one repetition together

CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials, or artifacts.anonymous: true "
    "for a public bucket"
)
NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
REFUSED_CREDENTIALS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}


class MissingError(InputError):
    """The bucket answers, and has no such object."""


@dataclass(frozen=True)
class Version:
    """One state of an object: its ETag (with quotes), its bytes, and its md5 where the ETag is one."""

    etag: str
    size: int
    md5: str | None


class Store:
    """One bucket at one endpoint; ``key`` is always without ``artifacts.prefix``."""

    def __init__(self, section: ArtifactsSection):
        self.bucket, self.prefix, self.timeout = section.bucket, section.prefix.strip("/"), section.timeout
        custom = (
            section.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        )
        config = Config(
            signature_version=UNSIGNED if section.anonymous else None,
            connect_timeout=section.timeout,
            read_timeout=section.timeout,
            retries={"mode": "standard", "total_max_attempts": 2},
            # Other servers than Amazon's seldom have a host name per bucket.
            s3={"addressing_style": "path" if custom else "auto"},
            response_checksum_validation="when_required",  # the checks of a resumed file are made on the file
        )
        try:
            self.client = boto3.client(
                "s3", endpoint_url=section.endpoint, region_name=section.region, config=config
            )
        except ValueError as error:
            raise InputError(
                f"artifacts.endpoint: found {custom!r}; allowed: null or an address such as https://host:9000"
            ) from error
        except BotoCoreError as error:
            raise InputError(
                f"artifacts: the AWS settings of this machine cannot be used: {error}"
            ) from error
        self.endpoint = self.client.meta.endpoint_url

    def object(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def name(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.object(key)}"

    def look(self, key: str) -> Version:
        """The object's present version. Raises InputError within ``DEADLINE * artifacts.timeout`` seconds."""
        head = self.ask(lambda: self._head(key), self.name(key))
        if not head.get("ETag"):
            raise InputError(
                f"{self.endpoint}: answers without an ETag; artifacts.endpoint must be an S3 server"
            )
        return Version(head["ETag"], head["ContentLength"], _md5(head))

    def ask(self, call: Callable[[], Any], name: str) -> Any:
        """What a short request about ``name`` gives. Raises InputError as ``look`` does."""
        try:
            return _within(self.timeout * DEADLINE, call)
        except TimeoutError as error:
            raise self._unreachable(f"nothing within {self.timeout * DEADLINE:g} s") from error
        except (HTTPClientError, BotoConnectionError) as error:
            raise self._unreachable(reason(error)) from error
        except (ClientError, BotoCoreError) as error:
            raise refusal(error, name) from error

    def read(self, key: str, version: Version, start: int) -> dict[str, Any]:
        """boto3's answer with ``version`` from byte ``start`` on; its error has status 412 after a change."""
        rest = {"Range": f"bytes={start}-"} if start else {}
        return self.client.get_object(Bucket=self.bucket, Key=self.object(key), IfMatch=version.etag, **rest)

    def _head(self, key: str) -> dict[str, Any]:
        where = {"Bucket": self.bucket, "Key": self.object(key)}
        try:
            return self.client.head_object(**where)
        except ClientError:
            # A refused HEAD has no body, so it cannot say whether bucket, key or credentials are at fault.
            self.client.get_object(**where, Range="bytes=0-0")["Body"].close()
            raise

    def _unreachable(self, why: str) -> InputError:
        return InputError(
            f"{self.endpoint}: no answer ({why}); check the network, artifacts.endpoint and "
            "artifacts.timeout, or choose another source"
        )


def refusal(error: ClientError | BotoCoreError, name: str) -> InputError:
    """Why the endpoint, or boto3 before it asked, does not give the object ``name``, and what to do."""
    bucket = "/".join(name.split("/")[:3])
    if isinstance(error, NO_CREDENTIALS):
        return InputError(
            f"{name}: no usable AWS credentials on this machine ({reason(error)}); {CREDENTIALS}"
        )
    if not isinstance(error, ClientError):
        return InputError(f"{name}: no usable answer ({reason(error)}); check artifacts.endpoint")
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchBucket":
        return InputError(f"{bucket}: no such bucket; check artifacts.bucket and artifacts.endpoint")
    if code in REFUSED_CREDENTIALS:
        return InputError(f"{name}: the AWS credentials of this machine were refused ({code}); {CREDENTIALS}")
    if status(error) == 404:
        return MissingError(f"{name}: no such object; check the key, artifacts.prefix and artifacts.endpoint")
    if status(error) in (401, 403):
        return InputError(
            f"{name}: access denied; a bucket says so of a private object and, where it may not be listed, "
            "of a missing one; check the key, artifacts.prefix and artifacts.anonymous"
        )
    return InputError(
        f"{name}: the server answered {status(error)} ({reason(error)}); run the same again later"
    )


def status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def reason(error: Exception) -> str:
    """The innermost part of a nested network error, in one line: `[Errno 111] Connection refused`."""
    inner = getattr(error, "kwargs", {}).get("error") or error
    return " ".join(str(inner).split()).removesuffix("')").split(">: ")[-1].split("Connection broken: ")[-1]


def _md5(head: dict[str, Any]) -> str | None:
    """The ETag, unless the object came in parts or is encrypted with a key: then it is no md5."""
    plain = head.get("ServerSideEncryption") in (None, "AES256") and not head.get("SSECustomerAlgorithm")
    etag = head["ETag"].strip('"')
    return etag if plain and re.fullmatch("[0-9a-f]{32}", etag) else None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """``call()``, or TimeoutError: boto3's limits begin anew at every address and miss the name lookup."""
    future: Future[Any] = Future()

    def ask() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 (handed to the caller)
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return future.result(timeout=seconds)
