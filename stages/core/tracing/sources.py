"""Plain networks -> sources: traced, verified, compared with each other and put in a matching's order."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stages.core.graph.trace import Trace, trace, verify
from stages.core.merged.network import Source, Task
from stages.core.runtime.errors import InputError
from stages.core.units.groups import Matching, UnitSplit, check_matching, check_splits, permute, unit_order


def make_sources(
    networks: Sequence[nn.Module], tasks: Sequence[Task], example: Tensor, labels: str
) -> list[Source]:
    """Trace and verify networks of one architecture.

    example: (n, ...) images. labels: shared or separate. Raises InputError naming the first thing that differs.
    """
    if len(networks) < 2:
        raise InputError(f"found {len(networks)} network; allowed: two or more")
    traces = [trace(network, example) for network in networks]
    head = traces[0].graph.output if labels == "separate" else None
    for task, network, other in zip(tasks, networks, traces, strict=True):
        _check_same(task, traces[0], other)
        _check_tensors(task, networks[0], network, set(head.parameters.values()) if head else set())
        width = other.layouts[other.graph.output.name].width
        if width != len(task.classes):
            raise InputError(f"task {task.name}: {width} logits for {len(task.classes)} classes")
    if labels == "shared" and len({task.classes for task in tasks}) > 1:
        names = "; ".join(f"{t.name}: {', '.join(t.classes[:4])}..." for t in tasks)
        raise InputError(
            f"labels: shared, but the tasks' classes differ ({names}); allowed: labels: separate"
        )
    verify(networks[0], traces[0], example[:2].cpu())
    device = example.device
    return [
        Source(own, {k: v.detach().to(device) for k, v in network.state_dict().items()}, task)
        for own, network, task in zip(traces, networks, tasks, strict=True)
    ]


def _check_same(task: Task, first: Trace, other: Trace) -> None:
    if len(first.graph.nodes) != len(other.graph.nodes):
        raise InputError(
            f"task {task.name}: {len(other.graph.nodes)} operations, the first network has "
            f"{len(first.graph.nodes)}; allowed: networks of one architecture"
        )
    for a, b in zip(first.graph.nodes, other.graph.nodes, strict=True):
        if a != b:
            raise InputError(
                f"task {task.name}: {b.name} is {b.operation} {dict(b.attributes)}, in the first network "
                f"{a.name} is {a.operation} {dict(a.attributes)}; allowed: networks of one architecture"
            )


def _check_tensors(task: Task, first: nn.Module, other: nn.Module, heads: set[str]) -> None:
    theirs = other.state_dict()
    differ = sorted(first.state_dict().keys() ^ theirs.keys())
    if differ:
        where = "the first network" if differ[0] in theirs else "this network"
        raise InputError(
            f"task {task.name}: {differ[0]} is missing in {where}; allowed: networks of one architecture"
        )
    for name, tensor in first.state_dict().items():
        shapes = tuple(tensor.shape), tuple(theirs[name].shape)
        if shapes[0] != shapes[1] and name not in heads:
            raise InputError(
                f"task {task.name}: {name} is {shapes[1]}, in the first network {shapes[0]}; "
                "allowed: networks of one architecture"
            )
        if not torch.isfinite(theirs[name]).all():
            raise InputError(
                f"task {task.name}: {name} holds NaN or infinite values; allowed: finite weights"
            )


def align(sources: Sequence[Source], matching: Matching, splits: Mapping[str, UnitSplit]) -> list[Source]:
    """The same functions with their units in merged order: matched pairs side by side, shared ones first."""
    check_matching(matching, sources[0].trace.spec, len(sources))
    check_splits(splits, sources[0].trace.spec)
    return [
        Source(
            s.trace,
            permute(s.state, s.trace.spec, unit_order(matching, splits, m, s.trace.spec)),
            s.task,
            s.about,
        )
        for m, s in enumerate(sources)
    ]


def merged_units(matching: Matching, splits: Mapping[str, UnitSplit]) -> dict[str, Tensor]:
    """{group: int64 (N, d)}: each source's own units in merged order, as a merged network records them."""
    return {
        name: matching.units[name][:, list(split.shared) + list(split.separate)]
        for name, split in splits.items()
    }
