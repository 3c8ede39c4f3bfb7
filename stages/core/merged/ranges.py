"""What a merged file may say: every number in its range, and no size that its own tensors do not bear out.

A file with a right seal can still be one that somebody wrote: nothing here is larger than a small multiple of the
file before it has been looked at.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.core.graph.nodes import Graph
from stages.core.graph.trace import Trace
from stages.core.runtime.errors import InputError, some

MOST_WHOLE = 2**31 - 1  # what torch can index
MOST_NODES = 20_000
MOST_TASKS = 256
MOST_EXAMPLE = 2**24  # numbers of one input
SPARE = 2**24  # entries of arrangements that a small file may have beyond what its tensors bear out


def check_header(header: Mapping[str, Any]) -> None:
    """The header's fields, before any of them is used. Raises InputError for the first that ``save`` never writes."""
    graph, example, tasks = header["graph"], header["example"], header["tasks"]
    if not isinstance(graph, list) or not 1 <= len(graph) <= MOST_NODES:
        raise InputError(f"graph: found {_count(graph)} nodes; allowed: from 1 to {MOST_NODES}")
    for node in graph:
        _check_numbers(f"graph: {node['name']!r:.40}", node["attributes"])
    whole = isinstance(example, list) and example and all(type(n) is int and n >= 1 for n in example)
    if not whole or math.prod(example) > MOST_EXAMPLE or example[0] != 1:
        raise InputError(
            f"example: found {example!s:.60}; allowed: the shape of one input, [1, ...], {MOST_EXAMPLE} numbers"
        )
    if not isinstance(tasks, list) or not 1 <= len(tasks) <= MOST_TASKS:
        raise InputError(f"tasks: found {_count(tasks)}; allowed: from 1 to {MOST_TASKS}")
    names = [task["name"] for task in tasks]
    words = [*names, *(name for task in tasks for name in task["classes"])]
    if not all(isinstance(word, str) for word in words) or len(set(names)) < len(names):
        raise InputError(f"tasks: found {some(names)}; allowed: different names, and classes by name")
    if header["labels"] not in ("shared", "separate"):
        raise InputError(f"labels: found {header['labels']!r:.40}; allowed: shared, separate")
    if not all(type(k) is int for k in header["shared"].values()):
        raise InputError("shared: found what is no whole number; allowed: units of each group")


def _count(found: Any) -> Any:
    return len(found) if isinstance(found, list) else type(found).__name__


def _check_numbers(where: str, value: Any, key: str = "") -> None:
    """Numbers of a node's attributes, at any depth."""
    if isinstance(value, Mapping):
        for name, own in value.items():
            _check_numbers(where, own, name)
    elif isinstance(value, list):
        for own in value:
            _check_numbers(where, own, "counts" if key == "groups" else key)  # of a rearrangement
    elif isinstance(value, int | float):
        least, most = LIMITS.get(key, (-MOST_WHOLE, MOST_WHOLE))
        entry = most == MOST_NUMBER or key not in LIMITS
        endless = isinstance(value, float) and math.isinf(value) and entry  # of a clamp, of a padding
        if not endless and not least <= value <= most:
            raise InputError(f"{where}: {key}: found {value:.3g}; allowed: from {least} to {most}")


MOST_NUMBER = torch.finfo(torch.float64).max
LIMITS = {
    "eps": (0, 1),
    "groups": (1, MOST_WHOLE),
    "scale_factor": (0, 1024),
    **dict.fromkeys(
        ("fill", "true", "false", "value", "min", "max"), (-MOST_NUMBER, MOST_NUMBER)
    ),  # entries, not sizes
}


def check_sizes(graph: Graph, shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
    """Gate before the graph is run: a merged network is no smaller than one of its sources."""
    used = {name for node in graph.nodes for name in node.parameters.values()}
    if missing := sorted(used - shapes.keys()):
        raise InputError(
            f"shapes: {missing[0]!r:.40} is not there; allowed: every tensor that the graph reads"
        )
    claimed = sum(math.prod(shapes[name]) for name in used)
    _compare("shapes", claimed, entries_of(tensors))


def check_widths(trace: Trace, networks: int, tensors: Mapping[str, Tensor]) -> None:
    """Gate before anything is arranged: every entry of every value of every network has a place."""
    widths = sum(layout.width for layout in trace.layouts.values())
    _compare("graph", networks * widths, 4 * entries_of(tensors) + SPARE)


def check_parameters(merged: int, classes: int, tensors: Mapping[str, Tensor]) -> None:
    """Gate before the network is built. merged: parameters it will have, by formula, beside ``classes`` of heads."""
    _compare("shared", merged + classes, entries_of(tensors))


def entries_of(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers a file holds."""
    return sum(tensor.numel() for tensor in tensors.values())


def _compare(what: str, claimed: int, held: int) -> None:
    if claimed > held:
        raise InputError(f"{what}: says {claimed} numbers; allowed: the {held} that its tensors bear out")


def check_values(state: Mapping[str, Tensor]) -> None:
    """The tensors of a merged network: floats of one type, finite, variances not negative.

    What is added to a value or masks it may be minus infinity. Raises InputError with the first that is not.
    """
    if empty := [name for name, tensor in state.items() if tensor.is_meta]:
        raise InputError(f"{empty[0]}: found a tensor on the meta device; allowed: one with numbers")
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    kinds = {str(tensor.dtype) for name, tensor in state.items() if name not in counts}
    if not kinds <= FLOATS or len(kinds) > 1 or any(state[name].dtype != torch.int64 for name in counts):
        raise InputError(f"weights: found {some(sorted(kinds))}; allowed: one of {some(sorted(FLOATS))}")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        masks = name.rpartition(".")[2] in ("mask", "value")
        least = tensor.clamp(min=torch.finfo(tensor.dtype).min) if masks else tensor
        if not bool(least.isfinite().all()):
            raise InputError(f"{name}: found NaN or infinity; allowed: finite numbers")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise InputError(f"{name}: found a negative variance; allowed: zero or more")


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """The tensors of a merged network as it was built. Raises InputError with the first that is not."""
    for name in sorted({*state, *expected}, key=lambda name: (name in expected, name)):
        found = f"the shape {tuple(state[name].shape)}" if name in state else "nothing by this name"
        if name not in expected:
            raise InputError(f"{name}: found a tensor of other layers; allowed: those that merging built")
        if name not in state or state[name].shape != expected[name]:
            raise InputError(f"{name}: found {found}; allowed: {tuple(expected[name])}, as merging built it")


FLOATS = {"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
