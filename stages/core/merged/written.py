"""A merged network is written: one safetensors file with a header in JSON and a seal over both."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from stages.core.graph.nodes import graph_to_json
from stages.core.merged.ranges import check_shapes, check_values
from stages.core.merged.seal import FORMAT, SEAL, seal_of
from stages.core.runtime.errors import InputError, shown
from stages.core.runtime.files import write_tensors


def write_merged(network: nn.Module, path: str | Path) -> None:
    """Write a MergedNetwork. Raises InputError where the file could not be read: for weights that are not finite, or of
    other layers than were built, and for an ``about`` that is no JSON.
    """
    header = {
        "format": FORMAT,
        "graph": graph_to_json(network.trace.graph),
        "example": list(network.trace.shapes[network.trace.graph.nodes[0].name]),
        "shapes": network.trace.parameters,
        "tasks": [asdict(task) for task in network.tasks],
        "labels": network.labels,
        "shared": network.shared,
        "corrected": network.corrected,
        "about": network.about,
        **({"dense": True} if network.dense else {}),
    }
    if not isinstance(network.about, dict):
        raise InputError(f"about: found {shown(network.about)}; allowed: a dict")
    check_shapes(network.state_dict(), network.expected_shapes)
    check_values(network.state_dict())
    units = {f"units/{name}": value for name, value in network.units.items()}
    tensors = {**network.state_dict(), **units}
    try:
        text = json.dumps(header, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"about: found what JSON does not hold ({error}); allowed: texts, numbers, lists, dicts"
        ) from error
    write_tensors(path, {**tensors, SEAL: seal_of(text, tensors)}, {"merged": text})
