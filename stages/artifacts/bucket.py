"""`source: s3`: objects of the bucket, downloaded once per machine, checked, and copied into the workspace.

A download lives in a cache outside the workspace, where it survives a stage that is run again:
`<cache>/<bucket>/<hash of endpoint, bucket and key>-<name>/` holds `<ETag>.part` while it grows and
`<ETag>.<sha256>` when it is whole: a file's name says which version it is and what its bytes must be.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import urllib3
from botocore.exceptions import BotoCoreError, ClientError
from tqdm import tqdm

from stages.artifacts.checks import Version, difference
from stages.artifacts.client import BUSY, UNREADABLE, MissingError, Store, reason, refusal, status, within
from stages.artifacts.listing import closest
from stages.core.runtime.cache import alone, cache_folder
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import FULL, replacing, sha256
from stages.core.runtime.progress import Bar
from stages.core.settings.params import ArtifactsSection
from stages.core.settings.places import split_url

BYTES_AT_A_TIME = 1 << 16  # bytes; what a cut connection can cost at most
PROGRESS = 1 << 20  # bytes; an attempt that brought less counts as failed
ATTEMPTS = 4  # failed in a row
PAUSE = 0.2  # seconds after the first of them, then twice as long each time
LEAST = 1 << 13  # bytes a second; a slower connection counts as cut
VERSIONS = 3  # of an object that changes while it is read

log = logging.getLogger(__name__)


class _ChangedError(Exception):
    """The object is no longer the version that was asked for."""


def materialise(section: ArtifactsSection, files: Mapping[str, Path]) -> None:
    """Put the object of every key at its path; nothing is written before every object is here and checked.

    Raises InputError in one line: unreachable endpoint, refused access, missing bucket or object, cut or
    corrupted download, another sha256 than the pinned one, no space left.
    """
    if not files:
        return
    bucket = Bucket(section)
    cached = {key: bucket.fetch(key) for key in files}
    for key, path in files.items():
        # A copy, not a link: whoever edits or locks the workspace's file must not reach the cache.
        with bucket.cache_errors(), replacing(path) as temporary:
            shutil.copyfile(cached[key], temporary)


def materialise_urls(section: ArtifactsSection, files: Mapping[str, Path]) -> None:
    """The same for s3:// URLs, of whatever buckets; endpoint, credentials and pins are those of ``section``."""
    for name in sorted({split_url(url)[0] for url in files}):
        keys = {url: split_url(url)[1] for url in files if split_url(url)[0] == name}
        pins = {key: section.sha256[url] for url, key in keys.items() if url in section.sha256}
        own = section.model_copy(update={"bucket": name, "prefix": "", "sha256": pins})
        materialise(own, {key: files[url] for url, key in keys.items()})


class Bucket:
    """The bucket seen through the cache of this machine."""

    def __init__(self, section: ArtifactsSection):
        self.store = Store(section)
        self.pins = section.sha256
        self.cache = download_cache(section)

    def fetch(self, key: str) -> Path:
        """The object as a checked file in the cache: from there, or downloaded, or a download continued.

        Without a pinned sha256 the bucket is asked for the object's ETag; with one, a cached file needs no
        network. Raises InputError as ``materialise`` does.
        """
        name, pin = self.store.name(key), self.pins.get(key)
        with self.cache_errors(), alone(self._folder(key)) as folder:
            if pin and (whole := _whole(folder, f"*.{pin}")):
                return whole
            whole, version = self._present(key, folder)
            found = whole.suffix[1:]
            if pin and found != pin:
                if (
                    not version.md5 and not version.sums
                ):  # then the pin is the only check, and what was downloaded may be damaged
                    whole.unlink()
                raise InputError(
                    f"{name}: found sha256 {found}, artifacts.sha256 pins {pin}; mend the pin or the object"
                )
            log.info("%s: %s, sha256 %s", name, _size(version.size), found)
            return whole

    def _present(self, key: str, folder: Path) -> tuple[Path, Version]:
        """The file of the object's present version, whatever the cache holds of it."""
        name = self.store.name(key)
        for _ in range(VERSIONS):
            try:
                version = self.store.look(key)
            except MissingError as error:
                raise InputError(f"{name}: no such object; {closest(self.store, key)}") from error
            if whole := _whole(folder, f"{_stem(version)}.{'?' * 64}"):
                return whole, version
            try:
                return self._download(key, folder, version), version
            except _ChangedError:
                log.info("%s: changed on the server; starting over", name)
        raise InputError(f"{name}: changed {VERSIONS} times while it was read; run the same again later")

    @contextlib.contextmanager
    def cache_errors(self) -> Iterator[None]:
        """Turn a failed read or write in the cache into one line."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise InputError(
                    f"{self.cache}: no space left on the device for the download ({error.strerror}); free "
                    "some or set artifacts.cache to a folder elsewhere; running the same again resumes"
                ) from error
            where = error.filename or self.cache
            raise InputError(
                f"{where}: the download cache cannot be used ({error.strerror or error}); set "
                "artifacts.cache to a folder that can be written"
            ) from error

    def _folder(self, key: str) -> Path:
        identity = "\n".join([self.store.endpoint, self.store.bucket, self.store.object(key)])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:20]
        return self.cache / self.store.bucket / f"{digest}-{Path(key).name[-80:]}"

    def _download(self, key: str, folder: Path, version: Version) -> Path:
        """Bring the partial file of ``version`` to its full size, check it and give it its final name."""
        name, part = self.store.name(key), folder / f"{_stem(version)}.part"
        for stale in set(folder.glob("*.part")) - {part}:
            stale.unlink()
        with open(part, "ab") as target:
            if target.tell() > version.size:
                _empty(target)
            kept = target.tell()
            log.info("%s: downloading %s, %s of it kept from before", name, _size(version.size), _size(kept))
            _room(folder, version.size - kept)
            with Bar(total=version.size, initial=kept, desc=key, unit="B", unit_scale=True) as bar:
                self._fill(key, version, target, bar)
        return self._checked(key, part, version)

    def _fill(self, key: str, version: Version, target: BinaryIO, bar: Bar) -> None:
        """Ask for what is missing until nothing is; give up after ATTEMPTS cuts in a row."""
        name, failed = self.store.name(key), 0
        while target.tell() < version.size:
            start, why = target.tell(), "the answer ended early"
            try:
                self._stream(key, version, target, bar)
            except ClientError as error:
                if status(error) in (412, 416):
                    raise _ChangedError from error
                if status(error) < 500 and status(error) not in BUSY:
                    raise refusal(error, name) from error
                why = reason(error)
            except InputError:
                raise
            except TimeoutError:
                why = f"less than {_size(LEAST)} a second"
            # urllib3's own errors and a bare ConnectionError pass botocore's stream as they are.
            except (BotoCoreError, urllib3.exceptions.HTTPError, ConnectionError) as error:
                why = reason(error)
            except UNREADABLE as error:
                raise refusal(error, name) from error
            have = target.tell()
            if have >= version.size:
                break
            failed = 0 if have - start >= PROGRESS else failed + 1
            if failed == ATTEMPTS:
                raise InputError(
                    f"{name}: the connection was cut {ATTEMPTS} times in a row ({why}); {_size(have)} of "
                    f"{_size(version.size)} are kept, running the same again resumes"
                )
            log.info("%s: cut at %s (%s); resuming", name, _size(have), why)
            time.sleep(PAUSE * 2 ** max(failed - 1, 0))

    def _stream(self, key: str, version: Version, target: BinaryIO, bar: Bar) -> None:
        """Append one answer's bytes to ``target``, a chunk at a time."""
        start = target.tell()
        answer = self.store.read(key, version, start)
        if answer["ETag"] != version.etag:  # a server that does not know If-Match
            answer["Body"].close()
            raise _ChangedError
        if start and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):  # nor Range
            _empty(target)
            bar.reset()
        body, seconds = answer["Body"], max(self.store.timeout, BYTES_AT_A_TIME / LEAST)
        while chunk := within(seconds, lambda: body.read(BYTES_AT_A_TIME)):
            if target.tell() + len(chunk) > version.size:
                body.close()
                _empty(target)
                raise InputError(
                    f"{self.store.name(key)}: the server sends more than the {_size(version.size)} it announced; "
                    "run the same again, and if it stays so the server is at fault"
                )
            target.write(chunk)
            target.flush()  # a killed process loses nothing that had arrived
            bar.update(len(chunk))
        body.close()  # not after an error: closing would wait for a read that is still under way

    def _checked(self, key: str, part: Path, version: Version) -> Path:
        """Rename a complete download to what it holds; delete it if that is not what the bucket says.

        A pin that it fits stands above the md5 of parts, which not every server computes alike.
        """
        name, digest = self.store.name(key), sha256(part)
        if version.parts and self.pins.get(key) == digest:
            found = None
        else:
            found = difference(part, version, lambda every: self.store.part_sizes(key, version, every))
        if found:
            part.unlink()
            raise InputError(
                f"{name}: corrupted download ({found}), deleted; run the same again, and if it stays so the "
                "stored object is damaged"
            )
        if found == "":
            log.warning("%s: the bucket gives nothing to check; artifacts.sha256 can pin %s", name, digest)
        whole = part.with_name(f"{_stem(version)}.{digest}")
        os.replace(part, whole)
        return whole


def download_cache(section: ArtifactsSection) -> Path:
    """Where downloads are kept: ``artifacts.cache``, else the cache of everything."""
    return Path(section.cache).expanduser() if section.cache else cache_folder()


def _whole(folder: Path, pattern: str) -> Path | None:
    """A file of the cache that still has the sha256 in its name; one that has not is deleted."""
    for path in folder.glob(pattern):
        if sha256(path) == path.suffix[1:]:
            return path
        log.warning("%s: damaged in the cache; deleted", path)
        path.unlink()
    return None


def _room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{_size(size)} needed, {_size(free)} free")


def _empty(target: BinaryIO) -> None:
    target.seek(0)
    target.truncate()


def _stem(version: Version) -> str:
    return quote(version.etag.strip('"'), safe="").replace(".", "%2E")


def _size(size: int) -> str:
    return tqdm.format_sizeof(size, "B")
