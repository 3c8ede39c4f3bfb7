"""A profile as text of params.yaml, put behind the others: nothing else of the file is touched."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_text
from stages.core.settings.params import parse_params
from stages.core.settings.places import OWN, PATTERN, kind_of
from stages.core.settings.profiles import Profile


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
    lines = [f"  {name + ':':<21}# {comment}", f"    architecture: {_flow(found['architecture'])}"]
    lines += [f"    labels: {found['labels']}", "    tasks:"]
    for task, own in found["tasks"].items():
        lines.append(f"      {task}:")
        lines += [f"        {key}: {_flow(value)}" for key, value in own.items()]
    lines.append(f"    finetune: {_flow(found['finetune'])}")
    return "\n".join(lines) + "\n"


def add(path: Path, name: str, text: str) -> None:
    """Put the text of a profile at the end of `profiles`, whole or not at all.

    Raises InputError when there is a profile of this name, and when the file with it would not be a valid one.
    """
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if re.match(r"profiles:\s*(#.*)?$", line)]
    if len(starts) != 1:
        raise InputError(f"{path}: found {len(starts)} lines `profiles:`; allowed: one, of its own")
    tops = (index for index in range(starts[0] + 1, len(lines)) if re.match(r"[^\s#]", lines[index]))
    end = next(tops, len(lines))
    while not lines[end - 1].strip() or lines[end - 1].startswith("#"):
        end -= 1  # comments and empty lines belong to what follows
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    after = "".join([*lines[:end], "\n", text, *lines[end:]])
    found = yaml.safe_load(after)
    if name in (yaml.safe_load(before)["profiles"] or {}):
        raise InputError(
            f"{path}: profiles.{name}: is there already; allowed: another name, or remove it first"
        )
    parse_params({**found, "profile": name, "budget": 1.0}, str(path))
    write_text(path, after)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf")).strip()[1:-1]
