"""Whether several networks are of one architecture, so that they can be merged."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from stages.core.graph.nodes import Node
from stages.core.graph.operations import OPERATIONS
from stages.core.graph.source import Source
from stages.core.runtime.errors import InputError

KEEP_MEANS = ("add", "subtract", "scale", "divide_by", "mean", "sum")


def check_alike(sources: Sequence[Source], labels: str) -> None:
    """Gate: networks of one architecture, each with as many logits as it has classes.

    labels: shared or separate; the heads of separate label spaces may have different widths. Raises InputError naming
    the task and the first thing that differs.
    """
    if len(sources) < 2:
        raise InputError(f"found {len(sources)} network; allowed: two or more")
    first, behind = sources[0], (sources[0].graph.head, *sources[0].graph.tail)
    heads = {name for node in behind if node is not None for name in node.parameters.values()}
    heads = heads if labels == "separate" else set()
    for source in sources:
        _check_length(first, source)
        _check_tensors(first, source, heads)
        _check_graph(first, source)
        task, width = source.task, source.trace.layouts[source.graph.output.name].width
        if width != len(task.classes):
            raise InputError(f"task {task.name}: {width} logits for {len(task.classes)} classes")
    if labels == "shared" and len({source.task.classes for source in sources}) > 1:
        names = "; ".join(f"{s.task.name}: {', '.join(s.task.classes[:4])}..." for s in sources)
        raise InputError(
            f"labels: shared, but the tasks' classes differ ({names}); allowed: labels: separate"
        )


def always_shared(sources: Sequence[Source]) -> list[str]:
    """Tensors before the head that differ between networks and act on what may not be separate.

    Those are values whose units keep their order: the input itself (its normalisation), what meets it one by one,
    logits that something else follows. With any there, no budget makes a merged network its sources side by side.
    """
    first = sources[0]
    trace, ends = first.trace, [first.graph.head, first.graph.output, *first.graph.tail]
    users, behind = first.graph.users(), {first.graph.output.name}
    for node in reversed(first.graph.nodes):  # heads whose logits are added, or moved about
        after = users[node.name]
        if after and all(u.name in behind and _keeps_means(u, node.name) for u in after):
            behind.add(node.name)
            ends.append(node)
    free = trace.spec.free.keys()
    found: dict[str, None] = {}
    for node in first.graph.nodes:
        kept = not {segment.group for segment in trace.layouts[node.name].segments} & free
        if kept and node not in ends:
            found |= dict.fromkeys(node.parameters.values())
    return [n for n in found if any(not torch.equal(first.state[n], s.state[n]) for s in sources[1:])]


def _keeps_means(node: Node, value: str) -> bool:
    """Whether it gives of a mean of values the mean of what it gives of each."""
    picks = node.operation == "gather" and node.inputs[0] == value
    return picks or node.operation in KEEP_MEANS or OPERATIONS[node.operation].moves


def _check_length(first: Source, other: Source) -> None:
    found, expected = other.graph.nodes, first.graph.nodes
    if len(found) != len(expected):
        raise InputError(
            f"task {other.task.name}: {len(found)} operations, the first network has {len(expected)}; "
            "allowed: networks of one architecture"
        )


def _check_graph(first: Source, other: Source) -> None:
    for a, b in zip(first.graph.nodes, other.graph.nodes, strict=True):
        if a != b and not (a in first.graph.tail and _but_for_width(a) == _but_for_width(b)):
            raise InputError(
                f"task {other.task.name}: {b.name} is {b.operation} {dict(b.attributes)}, in the first network "
                f"{a.name} is {a.operation} {dict(a.attributes)}; allowed: networks of one architecture"
            )


def _but_for_width(node: Node) -> Node:
    """A node without the extents that are read off a value: behind heads, which may have other numbers of classes."""
    if node.operation != "rearrange":
        return node
    a = node.attributes
    atoms = [
        [1 if i == free else atom for i, atom in enumerate(own)]
        for own, free in zip(a["atoms"], a["free"], strict=True)
    ]
    return replace(node, attributes={**a, "atoms": atoms})


def _check_tensors(first: Source, other: Source, heads: set[str]) -> None:
    task = other.task.name
    differ = sorted(first.state.keys() ^ other.state.keys())
    if differ:
        where = "the first network" if differ[0] in other.state else "this network"
        raise InputError(
            f"task {task}: {differ[0]} is missing in {where}; allowed: networks of one architecture"
        )
    for name, tensor in first.state.items():
        expected, found = tuple(tensor.shape), tuple(other.state[name].shape)
        if expected != found and name not in heads:
            raise InputError(
                f"task {task}: {name} is {found}, in the first network {expected}; "
                "allowed: networks of one architecture"
            )
        if not torch.isfinite(other.state[name]).all():
            raise InputError(f"task {task}: {name} holds NaN or infinite values; allowed: finite weights")
