"""`source: local`: the user's own checkpoints and data, taken from the folder `own`."""

import logging
import shutil
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import files_below, replacing
from stages.core.runtime.progress import Bar
from stages.core.settings.datasets import passed_over
from stages.core.settings.places import OWN

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment a zip file can hold


log = logging.getLogger(__name__)


def materialise(
    files: Mapping[str, Path],
    homes: Mapping[str, str],
    own: Path = OWN,
    image_folders: Collection[str] = (),
) -> None:
    """Put `<own>/<key>` at the path of every key; for an archive `<name>.zip` the folder `<own>/<name>` will do.

    A key that starts with / or ~/ is a path of its own.

    A folder is packed as an uncompressed zip file whatever the key's suffix, sorted, with one fixed time: the same
    files give the same bytes. Hidden files are left out. Everything is found before anything is written.
    ``homes`` says of a key what it is and where to get it, for errors. image_folders: the keys of `kind: folder`, of
    which it is said which files no stage will read.
    Raises InputError in one line: missing file or folder, empty folder, unreadable file, no space left.
    """
    if files and not own.is_dir():
        raise InputError(
            f"{own}: no such folder; source: local takes from it {', '.join(files)}{_elsewhere(own)}"
        )
    packed = {
        key: _members(folder, homes.get(key))
        for key in files
        if (folder := _folder(key, homes.get(key), own))
    }
    for key, path in files.items():
        if key in packed:
            if key in image_folders and (left := passed_over(packed[key])):
                log.warning("%s: %s", key, left)
            _pack(packed[key], path)
        else:
            _copy(own / Path(key).expanduser(), path)


def _folder(key: str, home: str | None, own: Path) -> Path | None:
    """The folder to pack for ``key``, or None where a file has that name."""
    source = own / Path(key).expanduser()
    suffix = next((suffix for suffix in ARCHIVES if key.endswith(suffix)), "")
    folder = source.with_name(source.name.removesuffix(suffix))
    if source.is_file():
        return None
    if source.exists():
        raise InputError(f"{source}: found a folder; allowed: a file, or {key}.zip for a folder of images")
    wanted = f" ({home})" if home else ""
    if not suffix:
        raise InputError(
            f"{source}: no such file; put it there{wanted} or choose another source{_elsewhere(own)}"
        )
    if not folder.is_dir():
        raise InputError(
            f"{source}: no such file; put it there{wanted}, or its content in the folder {folder}{_elsewhere(own)}"
        )
    return folder


def _elsewhere(own: Path) -> str:
    """What to do where an experiment runs in a workspace of DVC's own, which has no files that are not in git."""
    top, inside, _ = str(Path.cwd()).partition("/.dvc/tmp/exps/")
    hint = f"; experiments in the queue run elsewhere, set own to the absolute path: -S own={top}/{own}"
    return hint if inside and not own.is_absolute() else ""


def _members(folder: Path, home: str | None) -> dict[str, Path]:
    """The files under ``folder``, links followed: name in the archive -> file, sorted by name."""
    members = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    if not members:
        raise InputError(f"{folder}: empty folder; allowed: {home or 'the files of the archive'}")
    for name in members:
        if not name.isprintable():  # also what is not UTF-8
            raise InputError(f"{folder}: found a file named {name!r}; allowed: printable names")
    return dict(sorted(members.items()))


def _pack(members: Mapping[str, Path], path: Path) -> None:
    sizes = {name: member.stat().st_size for name, member in members.items()}
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        Bar(total=sum(sizes.values()), unit="B", unit_scale=True, desc=path.name) as bar,
    ):
        for name, member in members.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, sizes[name]
            with _reading(member) as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target)
            bar.update(sizes[name])


def _copy(source: Path, path: Path) -> None:
    with _reading(source) as content, replacing(path) as temporary, open(temporary, "wb") as target:
        shutil.copyfileobj(content, target, 1 << 20)


def _reading(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
