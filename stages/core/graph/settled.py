"""How what moves entries about runs where there are more units than in a source."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from stages.core.graph.axes import SeveralDimensionsError
from stages.core.graph.layouts import Layout, Segment
from stages.core.graph.nodes import Node
from stages.core.graph.operations import run_node
from stages.core.runtime.errors import InputError


def settle(
    node: Node,
    inputs: Sequence[Layout],
    output: Layout,
    shapes: Mapping[str, torch.Size],
    permutable: set[str],
) -> tuple[Node, tuple[int, ...] | None]:
    """How a node that moves entries runs where there are more units: as it is, or by where each entry comes from."""
    names = {s.group for layout in (*inputs, output) for s in layout.segments}
    shape, layout = shapes[node.inputs[0]], inputs[0]
    if node.operation == "concatenate":
        joined = [s for own in inputs for s in own.segments]
        if (
            any(own.dim != node.attributes["dim"] % len(shape) for own in inputs)
            or list(output.segments) == joined
        ):
            return node, None
        return node, tuple(range(output.width))
    if {name.rstrip("'") for name in names} <= {"", "input"}:
        return node, None
    touched = _touched(node, len(shape))
    if node.operation == "rearrange":
        _check_images(node, layout.dim)
        free = _free_atom(node, layout, output)
        if free is not None:
            return _with_free(node, layout.dim, free), None
        if not names & permutable:  # as many in a merged network
            return node, None
    elif layout.dim not in touched:
        return node, None
    if node.operation == "select" or layout.dim != output.dim or len(shape) != len(shapes[node.name]):
        raise InputError(
            f"{node.name}: {node.operation} cuts through units; allowed: whole units, or parts (heads, groups)"
        )
    return node, _sources_of(node, layout.dim, shape)


def _touched(node: Node, rank: int) -> set[int]:
    a = node.attributes
    if "pad" in a:
        return {rank - 1 - i // 2 for i, n in enumerate(a["pad"]) if n}
    if "sizes" in a:
        return {i - len(a["sizes"]) + rank for i, n in enumerate(a["sizes"]) if n != -1}
    return {d % rank for d in a.get("dims", [a.get("dim", 0)])}


def _free_atom(node: Node, layout: Layout, output: Layout) -> int | None:
    """The factor of the units' dimension that counts them, if groups stay whole; None where it is not so simple.

    What lies behind it are entries of one unit; what stands ahead of it counts copies of the same segments.
    """
    atoms, segments = node.attributes["atoms"][layout.dim], layout.segments
    ahead = sum(len(own) for own in node.attributes["atoms"][: layout.dim])
    for found, atom in enumerate(atoms):
        copies, behind = math.prod(atoms[:found]), math.prod(atoms[found + 1 :])
        own = segments[: len(segments) // copies]
        if (
            own * copies == segments
            and all(s.block % behind == 0 for s in own)
            and sum(s.entries for s in own) == atom * behind
            and _counts(node, ahead + found, [(s, s.block // behind) for s in own], output)
        ):
            return found
    return None


def _counts(node: Node, number: int, own: Sequence[tuple[Segment, int]], output: Layout) -> bool:
    """Whether a factor counts the units of the output too: what stands behind it there widens a unit.

    own: the segments that the factor counts, and how many of its entries a unit of each takes.
    """
    sizes, at = [atom for atoms in node.attributes["atoms"] for atom in atoms], 0
    for dim, count in enumerate(node.attributes["groups"]):
        order = node.attributes["order"][at : at + count]
        at += count
        if number in order:
            place = order.index(number)
            times, wider = (math.prod(sizes[i] for i in o) for o in (order[:place], order[place + 1 :]))
            expected = [(s.group, s.size, s.first, block * wider) for s, block in own] * times
            return dim == output.dim and expected == [
                (s.group, s.size, s.first, s.block) for s in output.segments
            ]
    return False


def _with_free(node: Node, dim: int, free: int) -> Node:
    given = list(node.attributes["free"])
    if given[dim] not in (None, free):
        raise InputError(f"{node.name}: images and units on one dimension; allowed: images first")
    given[dim] = free
    return dataclasses.replace(node, attributes={**node.attributes, "free": given})


def _check_images(node: Node, dim: int) -> None:
    """Images stay images: their dimension takes no units of the dimension ``dim`` in."""
    atoms, free, order = (node.attributes[key] for key in ("atoms", "free", "order"))
    numbers, start = [], 0
    for own in atoms:
        numbers.append(range(start, start + len(own)))
        start += len(own)
    sizes = [size for own in atoms for size in own]
    units = {n for n in numbers[dim] if sizes[n] > 1}
    images = {numbers[d][at] for d, at in enumerate(free) if at is not None}
    images -= units  # that were counted, of a graph that was laid out before
    at = 0
    for count in node.attributes["groups"]:
        together = set(order[at : at + count])
        at += count
        if together & images and together & units:
            raise SeveralDimensionsError(
                f"{node.name}: {node.operation} cuts through units; allowed: images apart from units"
            )


def _sources_of(node: Node, dim: int, shape: torch.Size) -> tuple[int, ...]:
    """Where each entry of the output's dimension comes from, -1 for what is new."""
    line = torch.arange(1, shape[dim] + 1).view([-1 if d == dim else 1 for d in range(len(shape))])
    found = run_node(node, [line.expand(shape)], {}) - 1
    first = found.movedim(dim, 0).flatten(1)
    if not bool((first == first[:, :1]).all()):
        raise InputError(
            f"{node.name}: {node.operation} cuts through units; allowed: whole units, or parts (heads, groups)"
        )
    return tuple(first[:, 0].tolist())
