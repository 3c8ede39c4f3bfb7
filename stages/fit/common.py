"""What all fits have in common, as one file that each of them depends on: code, parameters -> models/common.json.

DVC reads and writes the whole of dvc.lock behind every stage, in time that grows with its length. So twenty folders and
sections that every fit would name are named once, by the stage `common`; this writes what dvc.yaml says of it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import sha256, write_json
from stages.core.settings.params import load_params
from stages.core.settings.yaml_text import read_yaml

COMMON = Path("models/common.json")
STRAY = re.compile(
    r"__pycache__|\..*|.*~|.*\.(tmp|swp)"
)  # what .dvcignore leaves out, and other hidden names


def main() -> None:
    """Write the file. Raises InputError in one line for a mistake in params.yaml, or a stage that dvc.yaml lacks."""
    load_params()
    write_json(COMMON, gathered(Path()))


def gathered(top: Path) -> dict[str, Any]:
    """{"files": {path: SHA-256}, "params": {file: {key: value}}} of the stage `common`. Raises InputError."""
    stage = read_yaml(top / "dvc.yaml").get("stages", {}).get("common")
    if stage is None:
        raise InputError("dvc.yaml: found no stage common; allowed: the one that all fits depend on")
    params = read_yaml(top / "params.yaml")
    files = {str(path.relative_to(top)): sha256(path) for dep in stage["deps"] for path in _files(top / dep)}
    values: dict[str, dict[str, Any]] = {}
    for entry in stage["params"]:
        for file, keys in ({"params.yaml": [entry]} if isinstance(entry, str) else entry).items():
            file, keys = _filled(file, params), [_filled(key, params) for key in keys]
            content = params if file == "params.yaml" else read_yaml(top / file)
            values.setdefault(file, {}).update((key, _value(content, key)) for key in keys)
    return {"files": files, "params": values}


def _files(path: Path) -> Iterator[Path]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in found:
        parts = file.relative_to(path).parts if path.is_dir() else ()
        if not file.is_dir() and not any(STRAY.fullmatch(part) for part in parts):
            yield file


def _filled(text: str, params: Mapping[str, Any]) -> str:
    """As DVC fills in `${profile}`."""
    return re.sub(r"\$\{(\w+)\}", lambda found: str(params[found[1]]), text)


def _value(content: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


if __name__ == "__main__":
    command(main)
