"""What match and allocate leave for the fit: pairs of units, and which of them stay apart."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_json, read_tensors, write_tensors
from stages.core.runtime.reading import left_by
from stages.core.units.matching import Matching, UnitSplit


def save_matching(name: str, matching: Matching, benefits: Mapping[str, Tensor]) -> None:
    """Leave a matching, with its orders inside parts, and what separating each tuple is worth under its name."""
    found = {"units": matching.units, "similarity": matching.similarity, "benefit": benefits}
    write_tensors(
        _match_path(name),
        {f"{kind}/{group}": tensor for kind, own in found.items() for group, tensor in own.items()},
    )


def load_pairing(name: str) -> tuple[Matching, dict[str, UnitSplit], float, bool]:
    """What match and allocate left under a matching's name: pairs, splits, the budget reached, whether it is dense."""
    tensors, _ = read_tensors(_match_path(name))
    path = f"models/allocate/{name}.json"
    allocation = read_json(path)
    with left_by("allocate", path):
        splits = {
            group: UnitSplit(_whole_numbers(split["shared"]), _whole_numbers(split["separate"]))
            for group, split in allocation["splits"].items()
        }
        reached, dense = allocation["reached"], allocation["dense"]
        if not isinstance(reached, float) or not isinstance(dense, bool):
            raise TypeError(f"reached {reached!r:.20}, dense {dense!r:.20}")
    units, similarity = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("units/", "similarity/")
    )
    if not units or not similarity.keys() <= units.keys():
        raise InputError(f"{_match_path(name)}: not what the stage match leaves; run: dvc repro -f match")
    return Matching(units, similarity), splits, reached, dense


def load_benefits(name: str, groups: Iterable[str]) -> dict[str, Tensor]:
    """What separating each tuple of some groups is worth, as match left it under a matching's name."""
    tensors, _ = read_tensors(_match_path(name))
    with left_by("match", _match_path(name)):
        return {group: tensors[f"benefit/{group}"] for group in groups}


def _match_path(name: str) -> str:
    return f"models/match/{name}.safetensors"


def _whole_numbers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or any(type(unit) is not int for unit in found):
        raise TypeError(f"units {found!r:.30}")
    return tuple(found)
