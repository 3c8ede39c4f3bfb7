"""A merged network as one safetensors file, which is read without the code of the source networks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.core.graph.nodes import graph_from_json
from stages.core.graph.source import Task
from stages.core.graph.trace import lay_out
from stages.core.merged.network import FORMAT, MergedNetwork
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors


def load_merged(path: str | Path, device: str | torch.device = "cpu") -> MergedNetwork:
    """Read a merged network. Raises InputError when the file is missing, damaged or something else."""
    tensors, metadata = read_tensors(path)
    try:
        header = json.loads(metadata.get("merged", "{}"))
        if header.get("format") != FORMAT:
            raise InputError(f"not a merged network (format {header.get('format')!r}; allowed: {FORMAT})")
        return _from_header(header, tensors).to(device).eval()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path}: its header and its tensors do not fit together ({what})") from error


def _from_header(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> MergedNetwork:
    trace = lay_out(graph_from_json(header["graph"]), header["shapes"], header["example"])
    tasks = [Task(task["name"], tuple(task["classes"])) for task in header["tasks"]]
    units = {
        name.removeprefix("units/"): tensors.pop(name) for name in list(tensors) if name.startswith("units/")
    }
    network = MergedNetwork(trace, tasks, header["labels"], header["shared"], units, header["about"])
    for name in header["corrected"]:
        network.register_buffer(f"correction_{name}", torch.empty_like(tensors[f"correction_{name}"]))
    network.to(next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32))
    network.load_state_dict(tensors)  # after the type is set: it copies into what is there
    return network
