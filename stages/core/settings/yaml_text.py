"""YAML read as DVC reads it, version 1.2: `010` is ten, `yes` and `1:30` are texts, `1e3` is a number.

PyYAML alone reads version 1.1, in which these are other values: a stage would run with one, and dvc.lock name another.
A key that is there twice is refused, as DVC does.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.core.runtime.errors import InputError

BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
OTHERS = ("null", "merge", "value")  # as in version 1.1; dates stay texts


class Yaml(BASE):
    """A loader of plain values."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key.value, str) else id(key)
            if name in seen and not key.tag.endswith(":merge"):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r:.60} is there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _whole(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


Yaml.yaml_implicit_resolvers = {
    letter: [own for own in found if own[0].rpartition(":")[2] in OTHERS]
    for letter, found in BASE.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _letters) in SCALARS.items():
    Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_letters))
Yaml.add_constructor("tag:yaml.org,2002:int", _whole)


class Written(yaml.SafeDumper):
    """A writer of texts in quotes wherever version 1.1 or 1.2 would read something else."""


for _letter in {*yaml.SafeDumper.yaml_implicit_resolvers, *Yaml.yaml_implicit_resolvers}:
    Written.yaml_implicit_resolvers = {
        **Written.yaml_implicit_resolvers,
        _letter: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(_letter, []),
            *Yaml.yaml_implicit_resolvers.get(_letter, []),
        ],
    }


def in_one_line(value: Any) -> str:
    """A value as it stands behind a key of a file."""
    kind = {"Dumper": Written, "default_flow_style": True, "sort_keys": False, "width": float("inf")}
    if isinstance(value, Mapping | list):
        return yaml.dump(value, **kind).strip()
    return yaml.dump([value], **kind).strip()[1:-1]


def read_yaml(path: Path) -> Any:
    """What a file says. Raises InputError when it is not there or no YAML."""
    return parse_yaml(read_whole(path), str(path))


def read_whole(path: Path) -> str:
    """A file's text. Raises InputError when it is not there or no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file; run from the top folder of the project") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); allowed: a file of YAML") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}: line {line}: found the byte {error.object[error.start]:#x}; allowed: text in UTF-8"
        ) from error


def parse_yaml(text: str, where: str) -> Any:
    """What a text says. Raises InputError where it is no YAML."""
    try:
        return yaml.load(text, Loader=Yaml)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{where}: {line}not a YAML file ({said})") from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: not a YAML file ({error})") from error
