"""Requests to an S3 endpoint, and every way they fail as one line."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointProviderError,
    HTTPClientError,
    InvalidRegionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from stages.artifacts.checks import SUMS, Version, equal_parts
from stages.core.runtime.errors import InputError
from stages.core.settings.params import ArtifactsSection
from stages.core.settings.places import BUCKET_RULE, endpoint_fault

TRIES_WHEN_BUSY = 4  # while the server says it is busy
BUSY_PAUSE = 0.2  # seconds after the first of them, then twice as long each time
MOST_PARTS = 1000  # asked for one by one
BUSY = (429, 503)  # "too many requests", "slow down"
# What botocore raises for headers and bodies that are no numbers or no XML: its own, and what Python's readers raise.
UNREADABLE = (ResponseParserError, ValueError, LookupError)
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
logging.getLogger("botocore.credentials").setLevel(logging.CRITICAL)  # a traceback of what is one line here

REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}


class MissingError(InputError):
    """The bucket answers, and has no such object."""


class Store:
    """One bucket at one endpoint; ``key`` is always without ``artifacts.prefix``."""

    def __init__(self, section: ArtifactsSection):
        self.bucket, self.prefix, self.timeout = section.bucket, section.prefix.strip("/"), section.timeout
        places = {"artifacts.endpoint": section.endpoint}
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            places[f"{name}, of this machine's environment"] = os.environ.get(name)
        place, custom = next((own for own in places.items() if own[1]), ("", None))
        if custom and (fault := endpoint_fault(custom)):
            raise InputError(f"{place}: {fault}")
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
        except InvalidRegionError as error:
            raise InputError(
                f"artifacts.region: found {section.region!r}; allowed: a region's name such as us-east-1"
            ) from error
        except ValueError as error:  # of the machine's settings, as those above are checked
            raise InputError(f"artifacts: no S3 endpoint that boto3 takes: {reason(error)}") from error
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
        """The object's present version. Raises InputError within ``DEADLINE * artifacts.timeout`` seconds.

        A server that says it is busy is asked ``TRIES_WHEN_BUSY`` times, with pauses.
        """
        head = self._asked(key)
        if not head.get("ETag"):
            raise InputError(
                f"{self.endpoint}: answers without an ETag; artifacts.endpoint must be an S3 server"
            )
        size = head.get("ContentLength")
        if size is None or size < 0:
            raise InputError(
                f"{self.name(key)}: found the size {size}; allowed: a server that gives a Content-Length"
            )
        if size == 0:
            raise InputError(f"{self.name(key)}: found 0 bytes; allowed: an object that is not empty")
        return _version(head)

    def _asked(self, key: str, **more: Any) -> dict[str, Any]:
        """The answer to HEAD, or why there is none as InputError."""
        return self.ask(lambda: self._head(key, **more), self.name(key))

    def ask(self, call: Callable[[], Any], name: str) -> Any:
        """What a short request about ``name`` gives, or why it gives nothing as InputError: as ``look``."""
        for attempt in range(TRIES_WHEN_BUSY):
            try:
                return within(self.timeout * DEADLINE, call)
            except TimeoutError as error:
                raise self._unreachable(f"nothing within {self.timeout * DEADLINE:g} s") from error
            except (HTTPClientError, BotoConnectionError) as error:
                if "header value" in str(error):
                    raise InputError(
                        f"{name}: the AWS credentials of this machine hold a character that no header may "
                        f"have, often a newline at the end; {CREDENTIALS}"
                    ) from None  # the cause would show them
                raise self._unreachable(reason(error)) from error
            except ClientError as error:
                if status(error) not in BUSY or attempt + 1 == TRIES_WHEN_BUSY:
                    raise refusal(error, name) from error
                time.sleep(BUSY_PAUSE * 2**attempt)
            except (BotoCoreError, *UNREADABLE) as error:
                raise refusal(error, name) from error
            except OSError as error:  # boto3 reads what the environment names
                raise InputError(
                    f"{error.filename}: cannot be read ({error.strerror}), and the AWS settings of this machine "
                    "name it; check AWS_WEB_IDENTITY_TOKEN_FILE and ~/.aws, or set artifacts.anonymous: true"
                ) from error
        raise AssertionError("the last attempt returns or raises")

    def part_sizes(self, key: str, version: Version, every: bool) -> list[int] | None:
        """The sizes of the object's parts: by the first of them, or of ``every`` one; None where they are not told."""
        count = version.parts
        if count is None or (every and count > MOST_PARTS):
            return None
        sizes = []
        for number in range(1, count + 1) if every else [1]:
            try:
                head = self._asked(key, PartNumber=number)
            except InputError:  # a server that does not know the question
                return None
            if head.get("PartsCount") != count or not head.get("ContentLength"):
                return None
            sizes.append(head["ContentLength"])
        if every:
            return sizes if sum(sizes) == version.size else None
        return equal_parts(version.size, sizes[0], count)

    def read(self, key: str, version: Version, start: int) -> dict[str, Any]:
        """boto3's answer with ``version`` from byte ``start`` on; its error has status 412 after a change."""
        rest = {"Range": f"bytes={start}-"} if start else {}
        return self.client.get_object(Bucket=self.bucket, Key=self.object(key), IfMatch=version.etag, **rest)

    def _head(self, key: str, **more: Any) -> dict[str, Any]:
        where = {"Bucket": self.bucket, "Key": self.object(key)}
        try:
            return self.client.head_object(**where, ChecksumMode="ENABLED", **more)
        except ClientError:
            # A refused HEAD has no body, so it cannot say whether bucket, key or credentials are at fault.
            self.client.get_object(**where, Range="bytes=0-0")["Body"].close()
            raise

    def _unreachable(self, why: str) -> InputError:
        return InputError(
            f"{self.endpoint}: no answer ({why}); check the network, artifacts.endpoint, artifacts.region and "
            "artifacts.timeout, or choose another source"
        )


def refusal(error: Exception, name: str) -> InputError:
    """Why the endpoint, or boto3 before it asked, does not give the object ``name``, and what to do."""
    bucket = "/".join(name.split("/")[:3])
    if isinstance(error, NO_CREDENTIALS):
        return InputError(
            f"{name}: no usable AWS credentials on this machine ({reason(error)}); {CREDENTIALS}"
        )
    if isinstance(error, ParamValidationError | EndpointProviderError):
        return InputError(
            f"{bucket}: found a name that boto3 refuses ({reason(error)}); allowed: {BUCKET_RULE}"
        )
    if isinstance(error, UNREADABLE):
        return InputError(
            f"{name}: the server's answer cannot be read ({type(error).__name__}); artifacts.endpoint must be an S3 "
            "server"
        )
    if not isinstance(error, ClientError):
        return InputError(f"{name}: no usable answer ({reason(error)}); check artifacts.endpoint")
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchBucket":
        return InputError(f"{bucket}: no such bucket; check artifacts.bucket and artifacts.endpoint")
    if code in REFUSED_CREDENTIALS:
        return InputError(f"{name}: the AWS credentials of this machine were refused ({code}); {CREDENTIALS}")
    if status(error) == 301 or code in REGION:
        return InputError(
            f"{bucket}: is in another region ({code}); set artifacts.region to the bucket's own"
        )
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
    text = " ".join(str(inner).split()).removesuffix("')").split(">: ")[-1].split("Connection broken: ")[-1]
    return _redacted(re.sub(r"^\w*Connection\(host=.*?\): ", "", text))


def _redacted(text: str) -> str:
    """``text`` without headers and without the credentials of the environment."""
    for name in ("AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "***")
    return re.sub(r"(?i)(header (?:value|name)).*", r"\1", text)


def _version(head: dict[str, Any]) -> Version:
    """The ETag is an md5, or one of the parts' md5s, unless the object is encrypted with a key."""
    plain = head.get("ServerSideEncryption") in (None, "AES256") and not head.get("SSECustomerAlgorithm")
    found = re.fullmatch("([0-9a-f]{32})(-([1-9][0-9]{0,4}))?", head["ETag"].strip('"')) if plain else None
    sums = {name: head.get(f"Checksum{name.upper()}") for name in SUMS}
    return Version(
        head["ETag"],
        head["ContentLength"],
        found[1] if found and not found[3] else None,
        int(found[3]) if found and found[3] else None,
        # a checksum of checksums, of an object in parts, ends with their number
        tuple((name, told) for name, told in sums.items() if told and "-" not in told),
    )


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """``call()``, or TimeoutError: boto3's limits begin anew at every address and miss the name lookup."""
    future: Future[Any] = Future()

    def ask() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 (handed to the caller)
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return future.result(timeout=seconds)
