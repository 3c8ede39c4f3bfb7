"""The networks that finetune leaves: their tensors, and beside them what tracing found, so that nothing else traces.

models/finetune/<task>.safetensors   the state dict
models/finetune/<task>.json          classes: names; example: the shape of one image, (1, ...); graph: nodes
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.core.graph.compare import check_alike
from stages.core.graph.nodes import graph_from_json, graph_to_json
from stages.core.graph.source import Source, Task, trace_among
from stages.core.runtime.files import read_json, read_tensors, sha256, write_json, write_tensors
from stages.core.runtime.reading import left_by
from stages.core.settings.params import Params

NETWORKS = Path("models/finetune")


def network_path(task: str) -> Path:
    """Where the finetune stage leaves a task's network."""
    return NETWORKS / f"{task}.safetensors"


def description(source: Source) -> dict[str, Any]:
    """What later stages are told of a network beside its tensors."""
    return {
        "classes": list(source.task.classes),
        "example": list(source.trace.shapes[source.graph.nodes[0].name]),
        "graph": graph_to_json(source.graph),
    }


def save_network(task: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Leave a network and its ``description``."""
    write_tensors(network_path(task), tensors)
    write_json(network_path(task).with_suffix(".json"), about)


def load_sources(params: Params, device: torch.device) -> list[Source]:
    """The finetuned networks of the active profile, each with the hash of its file."""
    sources: list[Source] = []
    for name in params.active.tasks:
        path = network_path(name)
        about, (tensors, _) = read_json(path.with_suffix(".json")), read_tensors(path)
        state = {key: tensor.to(device) for key, tensor in tensors.items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        with left_by("finetune", path.with_suffix(".json")):
            trace = trace_among(sources, graph_from_json(about["graph"]), shapes, about["example"])
            task = Task(name, tuple(about["classes"]))
        sources.append(Source(trace, state, task, {"sha256": sha256(path)}))
    check_alike(sources, params.active.labels)
    return sources
