"""A profile as text of params.yaml, put behind the others: nothing else of the file is touched."""

import os
import re
import stat
from pathlib import Path

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_text
from stages.core.settings.params import parse_params
from stages.core.settings.places import OWN, PATTERN, kind_of
from stages.core.settings.profiles import Profile
from stages.core.settings.yaml_text import in_one_line, parse_yaml, read_whole


def place_of(path: Path, archive: bool = False) -> str:
    """How a profile names a file: below data/own by its key, elsewhere by its absolute path.

    archive: it is a folder of images, or an archive of one; a folder is named as the archive it stands for.
    Raises InputError for a path with a line break.
    """
    whole, own = path.expanduser().resolve(), OWN.resolve()
    suffix = ".zip" if archive and whole.is_dir() else ""
    if whole.is_relative_to(own):
        place = whole.relative_to(own).as_posix() + suffix
        if re.fullmatch(PATTERN, place) and kind_of(place) == "key":
            return place
    place = whole.as_posix() + suffix
    if not re.fullmatch(PATTERN, place):
        raise InputError(f"{path}: a profile cannot name it; allowed: a path in one line")
    return place


def profile_text(name: str, profile: Profile, comment: str) -> str:
    """The profile in the layout of params.yaml, with the keys that were set."""
    found = profile.model_dump(exclude_unset=True)
    lines = [
        f"  {in_one_line(name) + ':':<21}# {comment}",
        f"    architecture: {in_one_line(found['architecture'])}",
    ]
    lines += [f"    labels: {found['labels']}", "    tasks:"]
    for task, own in found["tasks"].items():
        lines.append(f"      {in_one_line(task)}:")
        lines += [f"        {key}: {in_one_line(value)}" for key, value in own.items()]
    lines.append(f"    finetune: {in_one_line(found['finetune'])}")
    return "\n".join(lines) + "\n"


def add(path: Path, name: str, text: str) -> None:
    """Put the text of a profile at the end of `profiles`, whole or not at all; every other byte stays as it is.

    Raises InputError when there is a profile of this name, when the file with it would not be a valid one, and for a
    file that may only be read.
    """
    path = path.resolve()  # a link stays one
    shown = os.path.relpath(path)
    held = parse_yaml(read_whole(path), shown)["profiles"] or {}
    before = path.read_bytes().decode()
    lines = re.split(r"(?<=\n)", before)
    starts = [index for index, line in enumerate(lines) if re.match(r"\ufeff?profiles:\s*(#.*)?$", line)]
    if len(starts) != 1:
        raise InputError(f"{shown}: found {len(starts)} lines `profiles:`; allowed: one, of its own")
    tops = (index for index in range(starts[0] + 1, len(lines)) if re.match(r"[^\s#]", lines[index]))
    end = next(tops, len(lines))
    others = (re.match(r"( +)[^\s#]", line) for line in lines[starts[0] + 1 : end])
    indent = next((found[1] for found in others if found), "  ")
    while not lines[end - 1].strip() or lines[end - 1].startswith("#"):
        end -= 1  # comments and empty lines belong to what follows
    newline = "\r\n" if lines[starts[0]].endswith("\r\n") else "\n"
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += newline
    added = ["", *(indent + line[2:] for line in text.splitlines())]
    after = "".join([*lines[:end], *(line + newline for line in added), *lines[end:]])
    found = parse_yaml(after.removeprefix("\ufeff"), f"{shown}, with the profile")
    if name in held:
        raise InputError(
            f"{shown}: profiles.{name}: is there already; allowed: another name, or remove it first"
        )
    parse_params({**found, "profile": name, "budget": 1.0}, shown)
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise InputError(f"{shown}: may only be read; allowed: one that may be written, as after chmod u+w")
    write_text(path, after)
    path.chmod(mode)
