"""A graph at one input size: what shape each value has, where its units lie, and the groups that follow.

Nothing is guessed: an operation without a rule is an error that names it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.apart import heads_apart
from stages.core.graph.axes import SeveralDimensionsError, Units, Value
from stages.core.graph.crossed import check_beside, kept_beside
from stages.core.graph.extent import check_value, most_entries, place_for
from stages.core.graph.heads import with_heads
from stages.core.graph.layouts import Layout, Segment
from stages.core.graph.mixing import carried, mixing
from stages.core.graph.nodes import Graph, Node, check_graph, node_parameters
from stages.core.graph.operations import OPERATIONS, run_node
from stages.core.graph.places import PlaceOf, nowhere, placed
from stages.core.graph.resolve import Resolved
from stages.core.graph.selected import selected_first
from stages.core.graph.spread import Spread
from stages.core.runtime.errors import InputError
from stages.core.units.groups import PermutationSpec


@dataclass(frozen=True)
class Trace:
    """What is known of an architecture at one input size.

    layouts and shapes are by node name; shapes are those of one image, (1, ...). parameters: the shape of each
    tensor of the state dict. moved: for nodes that move units about in other ways than as whole groups, where each
    entry of the output comes from, -1 for zeros.
    """

    graph: Graph
    spec: PermutationSpec
    layouts: Mapping[str, Layout]
    shapes: Mapping[str, torch.Size]
    parameters: Mapping[str, tuple[int, ...]]
    moved: Mapping[str, tuple[int, ...]]

    def positions(self, node: Node) -> int:
        """How often a linear map is applied to one image: its multiply-accumulates are positions * weights."""
        name = node.inputs[0] if node.transposed else node.name
        return self.shapes[name].numel() // self.layouts[name].width

    @property
    def held(self) -> list[str]:
        """Layers before the head whose outputs are in a fixed order, and so are shared at every budget."""
        free, head = self.spec.free.keys(), self.graph.head
        return [
            node.name
            for node in self.graph.nodes
            if node.fitted
            and node not in (head, self.graph.output)
            and not {segment.group for segment in self.layouts[node.name].segments} & free
        ]

    def hidden_macs(self, node: Node) -> int:
        """Multiply-accumulates of a node without weights (attention) per entry of its output's units."""
        each = (
            OPERATIONS[node.operation].macs([self.shapes[name] for name in node.inputs], node.attributes)
            if node.inputs
            else 0
        )
        return each * (self.shapes[node.name].numel() // self.layouts[node.name].width) if each else 0

    def unit_dim(self, node: Node, role: str) -> int:
        """Which dimension of a node's parameter, as ``widened`` gives it, lies on the units of its output."""
        if not self._broadcast(node):
            return int(node.operation == "embedding")
        rank = len(self._seen(node, role))
        return self.layouts[node.name].dim - (len(self.shapes[node.name]) - max(rank, self._rank(node)))

    def widened(self, node: Node, role: str, tensor: Tensor, width: int | None = None) -> Tensor:
        """A parameter with one entry for each unit: one that all units have in common is repeated.

        width: of the value, where a head has another number of classes.
        """
        width = self.layouts[node.name].width if width is None else width
        if node.operation == "embedding":
            return tensor
        if not self._broadcast(node):
            return (
                tensor.expand(width, *tensor.shape[1:])
                if tensor.dim() and tensor.shape[0] == 1 < width
                else tensor
            )
        if "view" in node.attributes:
            tensor = tensor.view(node.attributes["view"])
        tensor = tensor.view([1] * (self._rank(node) - tensor.dim()) + list(tensor.shape))
        dim = self.unit_dim(node, role)
        sizes = [width if d == dim else -1 for d in range(tensor.dim())]
        return tensor.expand(sizes) if tensor.shape[dim] == 1 else tensor

    def _broadcast(self, node: Node) -> bool:
        """Whether a node's parameters have entries where its value has."""
        return (
            node.operation.endswith("_parameter")
            or (
                node.operation == "layer_norm"
                and self.layouts[node.name].dim != len(self.shapes[node.name]) - 1
            )
            or node.operation == "attention"
        )

    def _seen(self, node: Node, role: str) -> Sequence[int]:
        return node.attributes.get("view", self.parameters[node.parameters[role]])

    def _rank(self, node: Node) -> int:
        """Dimensions a parameter needs to have one for units."""
        return len(self.shapes[node.name]) - self.layouts[node.name].dim


def lay_out(
    graph: Graph,
    parameters: Mapping[str, Sequence[int]],
    example: Sequence[int],
    place_of: PlaceOf = nowhere,
) -> Trace:
    """Apply every operation's rule, in order.

    parameters: the shape of each tensor of the state dict. example: the shape of one image, (1, ...). place_of: where
    each node is in the user's code. Raises InputError for what the table does not know, before anything is allocated.
    """
    try:
        return _laid_out(graph, parameters, example, place_of)
    except SeveralDimensionsError as error:
        first, tried = error, [graph]
    for change in (selected_first, lambda own: heads_apart(own, parameters)):
        for own in [change(own) for own in tried]:
            if own not in tried:
                with contextlib.suppress(SeveralDimensionsError):
                    return _laid_out(own, parameters, example, place_of)
                tried.append(own)
    raise first


@torch.no_grad()
def _laid_out(
    graph: Graph, parameters: Mapping[str, Sequence[int]], example: Sequence[int], place_of: PlaceOf
) -> Trace:
    check_graph(graph, parameters, example, OPERATIONS)
    # One zero seen as every parameter: real kernels say each value's shape, and nothing is allocated for weights.
    # (Tensors on the meta device would do too, but their first use imports a second's worth of compiler.)
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in parameters.items()}
    units, last = Units(), graph.last_uses()
    first = graph.nodes[0]
    seen = {first.name: _input(units, first, tuple(example))}
    shapes = {first.name: torch.Size(example)}
    tensors = {first.name: torch.zeros(tuple(example), device=place_for(math.prod(example)))}
    spread = Spread(
        graph,
        tensors[first.name],
        lambda node, x: _try_node(node, x, state),
        lambda node: OPERATIONS[node.operation].rule,
    )
    settled, waiting, logits = [first], list(reversed(graph.nodes[1:])), graph.logits
    while waiting:
        node = waiting.pop()
        with placed(node, place_of):
            own = {role: tuple(parameters[name]) for role, name in node.parameters.items()}
            inputs = [seen[name] for name in node.inputs]
            node, *rest = with_heads(
                mixing(spread.of(node, inputs), inputs, own),
                inputs,
                own.get("mask", ()),
                node.name in logits,
            )
            if rest:
                waiting += [*reversed(rest), node]
                continue
            settled.append(node)
            operation = OPERATIONS[node.operation]
            if operation.rule in (rules.linear, rules.channels, rules.group_norm):
                inputs[0] = seen[node.inputs[0]] = rules.as_read(units, node, inputs[0])
            elementwise = operation.rule is rules.same
            check_beside(node, inputs, elementwise)
            out = _try_node(node, [tensors[name] for name in node.inputs], state)
            check_value(node.name, out)
            tensors[node.name], shapes[node.name] = out, out.shape
            found = operation.rule(units, node, inputs, out.shape, own)
            found = kept_beside(node, inputs, found)
            seen[node.name] = carried(units, node, inputs, found, operation.run, elementwise, own)
        for name in last.get(node.name, ()):
            del tensors[name]
    for end in (first.name, graph.output.name):
        units.fixed += [own for own in (seen[end].labels, seen[end].across) if own is not None]
    resolved = Resolved(units)
    layouts: dict[str, Layout] = {}
    for node in settled:
        with placed(node, place_of):
            layouts[node.name] = resolved.layout(node.name, seen[node.name])
    nodes, moved = [], {}
    for node in settled:
        if node.inputs and OPERATIONS[node.operation].moves:
            read = [layouts[n] for n in node.inputs]
            with placed(node, place_of):
                node, source = _settled(node, read, layouts[node.name], shapes, set(resolved.spec.free))
            if source is not None:
                moved[node.name] = source
        nodes.append(node)
    own = {name: tuple(shape) for name, shape in parameters.items()}
    return Trace(Graph(tuple(nodes)), resolved.spec, layouts, shapes, own, moved)


def _input(units: Units, node: Node, example: tuple[int, ...]) -> Value:
    shape = torch.Size(example)
    if len(example) < 2 or node.attributes.get("integers"):
        return Value(torch.full([1] * len(example), -1), (), shape, True)
    labels = units.new(example[1], "input").view([-1 if d == 1 else 1 for d in range(len(example))])
    units.fixed.append(labels)
    return Value(labels, (1,), shape, True)


def _settled(
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
    images = {numbers[d][at] for d, at in enumerate(free) if at is not None}
    sizes = [size for own in atoms for size in own]
    units, at = {n for n in numbers[dim] if sizes[n] > 1} - images, 0
    for count in node.attributes["groups"]:
        together = set(order[at : at + count])
        at += count
        if together & images and together & units:
            raise InputError(
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


def _try_node(node: Node, inputs: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
    try:
        own = node_parameters(node, state)
        place = place_for(most_entries(node, inputs, own))
        if place == "meta" or any(value.is_meta for value in inputs):
            inputs, own = [value.to("meta") for value in inputs], {k: v.to("meta") for k, v in own.items()}
        return run_node(node, inputs, own)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise InputError(
            f"{node.name}: {node.operation} cannot run on {shapes} ({str(error).splitlines()[0]}); "
            "allowed: an example of the shape that the network takes"
        ) from error
