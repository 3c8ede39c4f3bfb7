"""What match and allocate leave for the fit: pairs of units, and which of them stay apart."""

from collections.abc import Mapping

from torch import Tensor

from stages.core.runtime.files import read_json, read_tensors, write_tensors
from stages.core.units.matching import Matching, UnitSplit


def save_matching(name: str, matching: Matching, benefits: Mapping[str, Tensor]) -> None:
    """Leave a matching, with its orders inside parts, and what separating each tuple is worth under its name."""
    found = {"units": matching.units, "similarity": matching.similarity, "benefit": benefits}
    write_tensors(
        f"models/match/{name}.safetensors",
        {f"{kind}/{group}": tensor for kind, own in found.items() for group, tensor in own.items()},
    )


def load_pairing(name: str) -> tuple[Matching, dict[str, UnitSplit], float, bool]:
    """What match and allocate left under a matching's name: pairs, splits, the budget reached, whether it is dense."""
    tensors, _ = read_tensors(f"models/match/{name}.safetensors")
    allocation = read_json(f"models/allocate/{name}.json")
    splits = {
        group: UnitSplit(tuple(split["shared"]), tuple(split["separate"]))
        for group, split in allocation["splits"].items()
    }
    units, similarity = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("units/", "similarity/")
    )
    return Matching(units, similarity), splits, allocation["reached"], allocation["dense"]
