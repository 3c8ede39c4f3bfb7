"""What a sweep holds in memory and on disk, before it runs, and where its values are kept because of it."""

import logging
import math
from collections.abc import Iterator

import psutil
import torch

from stages.core.graph.nodes import Node
from stages.core.runtime import ranks
from stages.core.runtime.cache import Storage
from stages.core.runtime.errors import InputError
from stages.core.sweep.sweep import Sweep, Visitor
from stages.core.sweep.values import free_disk, scratch

GIB = 2**30
# Times what is needed that is plenty: freed memory need not be returned then, which takes up to a third of the time.
ROOMY = 4
SMALLER = "fewer images, storage: disk, precision: bfloat16"

log = logging.getLogger(__name__)


def place_values(
    sweep: Sweep, visitor: Visitor, storage: Storage = "memory", memory: float | None = None, what: str = ""
) -> None:
    """Gate: decide where a sweep keeps its values, and refuse what will not fit.

    auto: in memory where they fit, else on disk, which is said. memory: GiB, None for what the machine or the GPU has
    free. Raises InputError, about ``what``, saying what is needed, what there is and which parameters make it smaller.
    """
    needed = peak_bytes(sweep, visitor)
    there = available(memory, sweep.device)
    sweep.keeper.on_disk = storage == "disk" or (storage == "auto" and needed > there)
    sweep.sparing = sweep.keeper.on_disk or ROOMY * needed > there
    if not sweep.keeper.on_disk:
        check_memory(needed, memory, sweep.device, what)
        return
    check_memory(
        disk_peak_bytes(sweep, visitor),
        memory,
        sweep.device,
        f"{what}, values on disk",
        "a smaller batch_size",
    )
    on_disk = disk_bytes(sweep, visitor)
    if on_disk > free_disk():
        raise InputError(
            f"{what}: needs {_gib(on_disk, up=True)} GiB in {scratch()}, there are {_gib(free_disk())} GiB; allowed: "
            "fewer images, precision: bfloat16, or XDG_CACHE_HOME on a larger disk"
        )
    if storage == "auto":
        log.info(
            "%s: would take %s GiB of memory, there are %s: values are kept on disk (%s GiB in %s)",
            what,
            _gib(needed, up=True),
            _gib(there),
            _gib(on_disk, up=True),
            scratch(),
        )


def peak_bytes(sweep: Sweep, visitor: Visitor) -> int:
    """What a sweep holds at most in memory: values of all images at the worst node, what the visitor holds there."""
    images, batch = _counts(sweep)
    peak = 0
    for node, live, held, own in _held(sweep, visitor):
        peak = max(peak, held * images)
        if visitor.wants(node):  # before the merged network runs
            extra = visitor.extra_bytes(node, images, batch) + visitor.kept_bytes(node, images)
            peak = max(peak, (live + own) * images + extra)
    images += sum(len(own) for own in sweep.batches if own.copied)
    return images * sweep.image_bytes + peak  # the images themselves, once and in their own type


def disk_bytes(sweep: Sweep, visitor: Visitor) -> int:
    """What it holds at most on disk where the values are kept there. A file gives its place back as a whole."""
    images, peak = _counts(sweep)[0], 0
    for node, live, _, own in _held(sweep, visitor):
        kept = visitor.kept_bytes(node, images) if visitor.wants(node) else 0
        out = _entries(sweep)[node.name] * sweep.precision.itemsize
        peak = max(peak, (live + out) * images, (live + own) * images + kept)
    return images * sweep.image_bytes + peak


def disk_peak_bytes(sweep: Sweep, visitor: Visitor) -> int:
    """What it holds at most in memory then: one batch at a node, whatever the number of images, and the visitor.

    A batch is read, brought into order and passed on; a visitor reads of all networks what it looks at.
    """
    images, batch = _counts(sweep)
    own, peak = sweep.dtype.itemsize, 0
    everything = _entries(sweep)
    for node in sweep.graph.nodes[1:]:
        most = max(
            2 * sum(_of_one(sweep, name, actor) for name in node.inputs)
            + 2 * _of_one(sweep, node.name, actor)
            for actor in (0, -1)
        )
        peak = max(peak, most * batch * own)
        if visitor.wants(node):
            read = sum(everything[name] for name in {*node.inputs, node.name})
            peak = max(peak, read * batch * own + visitor.extra_bytes(node, images, batch))
    at_hand = sum(len(own) for own in sweep.batches if own.at_hand)
    return at_hand * sweep.image_bytes + peak


def _counts(sweep: Sweep) -> tuple[int, int]:
    """How many images there are, and how many in the largest batch."""
    sizes = [len(batch) for batch in sweep.batches]
    return sum(sizes), max(sizes)


def _of_one(sweep: Sweep, name: str, actor: int) -> int:
    """Entries of a value of one image in a source (0), or in the last of all networks (-1)."""
    merged = sweep.merged if actor or not sweep.sources else None
    return sweep.trace.shapes[name].numel() if merged is None else merged.entries(name)


def _entries(sweep: Sweep) -> dict[str, int]:
    """Of every value of one image, in all networks together."""
    merged, networks = sweep.merged, len(sweep.sources)
    return {
        name: networks * shape.numel() + (0 if merged is None else merged.entries(name))
        for name, shape in sweep.trace.shapes.items()
    }


def _held(sweep: Sweep, visitor: Visitor) -> Iterator[tuple[Node, int, int, int]]:
    """Bytes of one image's values, node by node: before it; when all networks are through; of its sources' values."""
    entries, size = _entries(sweep), sweep.precision.itemsize
    last = sweep.graph.last_uses()
    entries[sweep.graph.nodes[0].name] = live = 0
    for node in sweep.graph.nodes[1:]:
        freed = sum(entries[name] for name in last[node.name])
        early = 0 if visitor.wants(node) else min(freed, entries[node.name])
        own = len(sweep.sources) * sweep.trace.shapes[node.name].numel()
        yield node, size * live, size * (live + entries[node.name] - early), size * own
        live += entries[node.name] - freed


def available(limit_gib: float | None, device: torch.device) -> int:
    """Bytes of memory that may be used. ``limit_gib`` None: what the machine (a rank's share) or the GPU has free."""
    if limit_gib is not None:
        return int(min(limit_gib, GIB) * GIB)  # more is as good as none, and at last no whole number
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks.on_this_machine()


def check_memory(
    needed: int,
    limit_gib: float | None,
    device: torch.device,
    what: str,
    smaller: str = SMALLER,
) -> None:
    """Gate: refuse what will not fit. ``limit_gib`` as of ``available``; smaller: what makes it so.

    Raises InputError saying what is needed, what there is and which parameters make it smaller.
    """
    there = available(limit_gib, device)
    if needed > there:
        raise InputError(
            f"{what}: needs {(least := _gib(needed, up=True))} GiB, there are {_gib(there)} GiB; "
            f"allowed: {smaller}, or a memory limit of about {least}"
        )


def _gib(size: int, up: bool = False) -> str:
    """Bytes in GiB, as `memory` is said: two places, or as many as show two digits of what is less."""
    found = size / GIB
    places = max(2, 1 - math.floor(math.log10(found))) if found else 2
    digits = round(found * 10**places, 6)
    return f"{(math.ceil if up else math.floor)(digits) / 10**places:.{places}f}"
