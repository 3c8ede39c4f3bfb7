"""What a sweep holds in memory, before it runs."""

import math

import psutil
import torch

from stages.core.runtime.errors import InputError
from stages.core.sweep.sweep import Sweep, Visitor

GIB = 2**30


def peak_bytes(sweep: Sweep, visitor: Visitor) -> int:
    """What a sweep holds at most: values of all images at the worst node, and what the visitor holds there."""
    trace, merged, networks = sweep.trace, sweep.merged, len(sweep.sources)
    images = sum(len(batch.images) for batch in sweep.batches)
    batch = max(len(batch.images) for batch in sweep.batches)
    own, itemsize = sweep.dtype.itemsize, sweep.storage.itemsize
    own_entries = {name: networks * shape.numel() for name, shape in trace.shapes.items()}
    entries = {
        name: count + (0 if merged is None else merged.entries(name)) for name, count in own_entries.items()
    }
    last, first = trace.graph.last_uses(), trace.graph.nodes[0].name
    always = images * trace.shapes[first].numel() * own  # the images themselves, once and in their own type
    entries[first] = live = peak = 0
    for node in trace.graph.nodes[1:]:
        freed = sum(entries[name] for name in last[node.name])
        watched = visitor.wants(node)
        held = live + entries[node.name] - (0 if watched else min(freed, entries[node.name]))
        peak = max(peak, always + held * images * itemsize)
        if watched:  # before the merged network runs
            held = live + own_entries[node.name]
            extra = visitor.extra_bytes(node, images, batch)
            peak = max(peak, always + held * images * itemsize + extra)
        live += entries[node.name] - freed
    return peak


def check_memory(needed: int, limit_gib: float | None, device: torch.device, what: str) -> None:
    """Gate: refuse what will not fit. ``limit_gib`` None: what the machine or the GPU has free.

    Raises InputError saying what is needed, what there is and which parameters make it smaller.
    """
    if limit_gib is not None:
        available = limit_gib * GIB
    elif device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"{what}: needs {needed / GIB:.2f} GiB, there are {math.floor(available / GIB * 100) / 100:.2f} GiB; "
            "allowed: fewer images, storage: bfloat16, or a larger memory limit"
        )
