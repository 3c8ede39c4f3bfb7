"""The values at which units are looked at: what layers read of a group, after the non-linearity and before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.graph.trace import Trace
from stages.core.units.groups import Axis, Inner, Span, span_index

ENDS = (
    "input",
    "linear",
    "conv2d",
    "batch_norm",
    "add",
    "multiply",
    "attention",
    "matmul",
    "conv1d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "subtract",
    "divide",
)  # what non-linearities come behind


@dataclass(frozen=True)
class FeatureUnits:
    """Units of one group along a value: where they start, how many, how many entries each.

    dim: where they lie, if not on the dimension of the value's units but across it: the mean over these is looked at.
    """

    name: str
    start: int
    count: int
    block: int
    entries: Tensor | None = None  # where they are, if they do not follow each other
    dim: int | None = None


@dataclass(frozen=True)
class Feature:
    """A value that is looked at, as what (after, before, inside), and the units on it."""

    point: str
    value: str
    held: tuple[FeatureUnits, ...]


def features(trace: Trace) -> dict[str, list[Feature]]:
    """All that is looked at, by the node that is visited then, in the order of the graph."""
    at, inside = points(trace), points_inside(trace)
    found = dict[str, list[Feature]]()
    for node in trace.graph.nodes:
        own = [Feature(point, value, _held(trace, value)) for point, value in at.get(node.name, ())]
        for value, inner, span in inside.get(node.name, ()):
            count = inner.parts * inner.size
            index = span_index(torch.arange(count), span) if span.entries else None
            across = node.attributes["dim"] if node.operation == "mix" else None
            units = FeatureUnits(inner.name, span.start, count, span.block, index, across)
            own.append(Feature("inside", value, (units,)))
        if own:
            found[node.name] = own
    return found


def _held(trace: Trace, value: str) -> tuple[FeatureUnits, ...]:
    """The free groups along a value."""
    layout, held = trace.layouts[value], list[FeatureUnits]()
    for name in dict.fromkeys(s.group for s in layout.segments if s.group in trace.spec.free):
        size = trace.spec.free[name].size
        for index in layout.places(name, size):
            start = int(index[0])
            follows = torch.equal(index, torch.arange(start, start + len(index)))
            held.append(FeatureUnits(name, start, size, len(index) // size, None if follows else index))
    return tuple(sorted(held, key=lambda units: units.start))


def points(trace: Trace) -> dict[str, list[tuple[str, str]]]:
    """Where features are taken: {node that is visited: (point, value)}. Every free group has one of each point."""
    at: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    covered: set[str] = set()
    here = {node.name: {units.name for units in _held(trace, node.name)} for node in trace.graph.nodes}
    for node in trace.graph.nodes:
        if node.linear and node.inputs[0] not in seen:
            seen.add(node.inputs[0])
            groups = here[node.inputs[0]]
            if groups:
                covered |= groups
                at.setdefault(node.name, []).append(("after", node.inputs[0]))
    layers = [n for n in trace.graph.nodes if n.linear or n.grouped or n.operation == "embedding"]
    # a group that no layer reads: what its layers write, or what has it
    for node in (*layers, *trace.graph.nodes):
        written = here[node.name]
        if written - covered:
            covered |= written
            seen.add(node.name)
            at.setdefault(node.name, []).append(("after", node.name))
    nodes = {node.name: node for node in trace.graph.nodes}
    known: dict[str, set[str]] = {}
    before = {name for value in seen for name in _before(nodes, value, known) if here[name]}
    left = set(trace.spec.free) - set[str]().union(*(here[name] for name in before))
    for node in trace.graph.nodes:  # a group that no such value holds: the first that does
        if here[node.name] & left:
            before.add(node.name)
            left -= here[node.name]
    for name in sorted(before):
        at.setdefault(name, []).append(("before", name))
    return at


def points_inside(trace: Trace) -> dict[str, list[tuple[str, Inner, Span]]]:
    """The same for units inside parts: {node that is visited: (value, units, where they lie on it)}."""
    at: dict[str, list[tuple[str, Inner, Span]]] = {}
    maps = [node for node in trace.graph.nodes if node.fitted or node.operation == "mix"]
    for inner in _single_units(trace):
        read, written = list[tuple[str, str, Span]](), list[tuple[str, str, Span]]()
        for node in maps:
            weight, reads = node.parameters["weight"], 0 if node.transposed else 1
            for span in inner.spans:
                if span.axis == Axis(weight, reads):
                    read.append((node.name, node.inputs[0], span))
                elif span.axis == Axis(weight, 1 - reads):
                    written.append((node.name, node.name, span))
            if weight in inner.inside:
                read.append((node.name, node.inputs[0], Span(Axis(weight, 1))))
        seen = set[tuple[str, int]]()
        for node_name, value, span in read or written:
            if (value, span.start) not in seen:
                seen.add((value, span.start))
                at.setdefault(node_name, []).append((value, inner, span))
    return at


def _single_units(trace: Trace) -> list[Inner]:
    """What the groups with orders inside their units consist of."""
    outer = {inner.outer for inner in trace.spec.inner.values()}
    return [inner for name in trace.spec.ordered if name in outer for inner in trace.spec.contents(name)]


def _before(nodes: dict[str, Node], value: str, known: dict[str, set[str]]) -> set[str]:
    """The values in front of the non-linearity (and pooling) that give ``value``."""
    if value not in known:
        node = nodes[value]
        end = node.operation in ENDS
        known[value] = {value} if end else set().union(*(_before(nodes, name, known) for name in node.inputs))
    return known[value]
