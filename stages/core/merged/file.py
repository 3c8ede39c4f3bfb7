"""A merged network from its safetensors file, which is read without the code of the source networks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.core.graph.nodes import graph_from_json
from stages.core.graph.source import Task
from stages.core.graph.trace import lay_out
from stages.core.merged.cost import split_cost
from stages.core.merged.network import MergedNetwork
from stages.core.merged.ranges import check_header, check_parameters, check_sizes, check_values, check_widths
from stages.core.merged.seal import FORMAT, SEAL, check_seal
from stages.core.runtime.errors import InputError, shown
from stages.core.runtime.files import read_metadata, read_tensors


def load_merged(path: str | Path, device: str | torch.device = "cpu") -> MergedNetwork:
    """Read a merged network. Raises InputError when the file is missing, damaged or something else.

    Its format is looked at first, then the seal over all it holds, then every range and size, before anything is
    built. It takes no more than a small multiple of the file's size.
    """
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"device: found {shown(device)}; allowed: cpu, or a GPU that is there") from error
    text = read_metadata(path).get("merged", "{}")
    try:
        header = json.loads(text)
        if header.get("format") != FORMAT:
            raise InputError(f"not a merged network (format {header.get('format')!r:.40}; allowed: {FORMAT})")
        tensors, _ = read_tensors(path)
        check_seal(text, tensors)
        del tensors[SEAL]
        return _from_header(header, tensors).to(place).eval()
    except InputError as error:
        said = str(error)
        raise InputError(said if said.startswith(f"{path}: ") else f"{path}: {said}") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path}: its header and its tensors do not fit together ({what})") from error


def _from_header(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> MergedNetwork:
    check_header(header)
    graph = graph_from_json(header["graph"])
    check_sizes(graph, header["shapes"], tensors)
    trace = lay_out(graph, header["shapes"], header["example"])
    tasks = [Task(task["name"], tuple(task["classes"])) for task in header["tasks"]]
    labels, shared = header["labels"], header["shared"]
    check_widths(trace, len(tasks), tensors)
    empty = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in header["shapes"].items()}
    dense = header.get("dense", False)
    if not isinstance(dense, bool):
        raise InputError(f"dense: found {dense!r:.40}; allowed: true, false")
    merged = split_cost(trace, empty, labels, "parameters", shared, len(tasks), dense)
    check_parameters(merged, sum(len(task.classes) for task in tasks) if labels == "separate" else 0, tensors)
    units = {
        name.removeprefix("units/"): tensors.pop(name) for name in list(tensors) if name.startswith("units/")
    }
    check_values(tensors)
    network = MergedNetwork(trace, tasks, labels, shared, units, header["about"], dense)
    for name in header["corrected"]:
        network.register_buffer(f"correction_{name}", torch.empty_like(tensors[f"correction_{name}"]))
    network.to(next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32))
    network.load_state_dict(tensors)  # after the type is set: it copies into what is there
    return network
