"""A graph at one input size: what shape each value has, where its units lie, and the groups that follow.

Nothing is guessed: an operation without a rule is an error that names it.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.graph import rules
from stages.core.graph.apart import heads_apart
from stages.core.graph.axes import SeveralDimensionsError, Units, Value
from stages.core.graph.beside_images import images_alone
from stages.core.graph.crossed import check_beside, kept_beside
from stages.core.graph.extent import check_value, place_for
from stages.core.graph.heads import last_products_of, scores_of, with_heads
from stages.core.graph.held import NOTHING, Held
from stages.core.graph.layouts import Layout
from stages.core.graph.mixing import carried, mixing, places_first
from stages.core.graph.nodes import Graph, Node, check_graph
from stages.core.graph.operations import BINARY, OPERATIONS
from stages.core.graph.part_moves import one_part_more
from stages.core.graph.places import PlaceOf, nowhere, placed
from stages.core.graph.resolve import Resolved
from stages.core.graph.selected import selected_first
from stages.core.graph.settled import settle
from stages.core.graph.shuffled import as_channels
from stages.core.graph.spread import Spread
from stages.core.graph.trial import shapes_of, try_node
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

    @property
    def largest(self) -> int:
        """Numbers in the largest value of one image."""
        return max(shape.numel() for shape in self.shapes.values())

    def positions(self, node: Node) -> int:
        """How often a linear map is applied to one image: its multiply-accumulates are positions * weights."""
        name = node.inputs[0] if node.transposed else node.name
        return self.shapes[name].numel() // self.layouts[name].width

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
    whole, first, tried = None, None, [graph]
    try:
        whole = _laid_out(graph, parameters, example, place_of)
        if whole.spec.free:
            return whole
    except InputError as error:
        first = error
    changes = (
        lambda own: images_alone(own, shapes_of(own, parameters, example)),
        selected_first,
        lambda own: heads_apart(own, parameters),
    )
    for change in changes if isinstance(first, SeveralDimensionsError) else ():
        for own in [change(own) for own in tried]:
            if own not in tried:
                with contextlib.suppress(InputError):
                    return _laid_out(own, parameters, example, place_of)
                tried.append(own)
    with contextlib.suppress(InputError):
        check_graph(graph, parameters, example, OPERATIONS)
        edges = places_first(graph, parameters, shapes_of(graph, parameters, example))
        found = _laid_out(edges, parameters, example, place_of) if edges != graph else None
        whole = found if found is not None and found.spec.free else whole
    if whole is not None:
        return whole
    found = [own for other in tried if (own := _with_held(other, parameters, example, place_of))]
    with contextlib.suppress(InputError):
        check_graph(graph, parameters, example, OPERATIONS)
        for change in changes if not found else ():  # what is held came before what they are for
            tried += [own for own in [change(own) for own in tried] if own not in tried]
            found = [own for other in tried[1:] if (own := _with_held(other, parameters, example, place_of))]
            if found:
                break
    if not found:
        raise first
    trace, held = max(found, key=lambda own: sum(group.size for group in own[0].spec.free.values()))
    if place_of is not nowhere:
        held.told()
    return trace


def _with_held(
    graph: Graph, parameters: Mapping[str, Sequence[int]], example: Sequence[int], place_of: PlaceOf
) -> tuple[Trace, Held] | None:
    """A trace with what has no rule held (stages.core.graph.held); None where nothing may be separate then."""
    held = Held()
    with contextlib.suppress(InputError):
        while True:
            trace = None
            with held.until_known():
                trace = _laid_out(graph, parameters, example, place_of, held)
            if not held.again():
                return (trace, held) if trace.spec.free else None
    return None


@torch.no_grad()
def _laid_out(
    graph: Graph,
    parameters: Mapping[str, Sequence[int]],
    example: Sequence[int],
    place_of: PlaceOf,
    held: Held = NOTHING,
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
        lambda node, x: try_node(node, x, state),
        lambda node: OPERATIONS[node.operation].rule,
    )
    before = {first.name: first}
    settled, waiting, logits = [first], list(reversed(graph.nodes[1:])), graph.logits
    last_products, scored = last_products_of(graph), scores_of(graph)
    while waiting:
        node = waiting.pop()
        own = {role: tuple(parameters[name]) for role, name in node.parameters.items()}
        inputs, rest = [seen[name] for name in node.inputs], []
        if held.reads(units, node, inputs):
            seen[node.inputs[0]] = inputs[0]
        if node.operation in BINARY and len(inputs[0].shape) != len(inputs[1].shape):
            ranks = [len(spread.shapes[name]) if name in spread.shapes else None for name in node.inputs]
            node, *rest = one_part_more(node, [own.shape for own in inputs], ranks)
            if rest:
                waiting += [*reversed(rest), node]
                continue
        read = node
        with held.instead(node), placed(node, place_of):
            node, *rest = held.as_it_is(node, inputs) or with_heads(
                mixing(spread.of(node, inputs), inputs, own),
                inputs,
                own.get("mask", ()),
                node.name in logits,
                node.name in last_products,
                own.get("weight", (0,))[0],
                node.name in scored,
            )
        if rest:
            held.made(read, [node, *rest])
            waiting += [*reversed(rest), node]
            continue
        settled.append(node)
        before[node.name] = node
        own = {role: tuple(parameters[name]) for role, name in node.parameters.items()}
        with held.lifted(node, before), placed(node, place_of):
            out = try_node(node, [tensors[name] for name in node.inputs], state)
            check_value(node.name, out)
        tensors[node.name], shapes[node.name] = out, out.shape
        if not held.as_it_is(node, inputs):
            with held.instead(node), placed(node, place_of):
                seen[node.name] = _units_of(units, node, inputs, out.shape, own, seen)
        if node.name not in seen:
            if held.reads(units, node, inputs):
                seen[node.inputs[0]] = inputs[0]
            seen[node.name] = held.value(units, node, inputs, out.shape)
        for name in last.get(node.name, ()):
            del tensors[name]
    for end in (first.name, graph.output.name):
        units.fixed += [own for own in (seen[end].labels, seen[end].across) if own is not None]
    resolved = Resolved(units)
    layouts: dict[str, Layout] = {}
    for node in settled:
        with held.later(node), placed(node, place_of):
            layouts[node.name] = resolved.layout(node.name, seen[node.name])
    nodes, moved = [], {}
    for node in settled if len(layouts) == len(settled) else ():
        if node.inputs and OPERATIONS[node.operation].moves:
            read, source = [layouts[n] for n in node.inputs], None
            with held.later(node), placed(node, place_of):
                node, source = settle(node, read, layouts[node.name], shapes, set(resolved.spec.free))
            if source is not None:
                moved[node.name] = source
        nodes.append(node)
    own = {name: tuple(shape) for name, shape in parameters.items()}
    return Trace(Graph(tuple(nodes)), resolved.spec, layouts, shapes, own, moved)


def _units_of(
    units: Units,
    node: Node,
    inputs: list[Value],
    out: torch.Size,
    own: rules.Shapes,
    seen: dict[str, Value],
) -> Value:
    """Where units lie on what a node gives, by its operation's rule."""
    operation = OPERATIONS[node.operation]
    if operation.rule in (rules.linear, rules.channels, rules.group_norm):
        inputs[0] = seen[node.inputs[0]] = rules.as_read(units, node, inputs[0])
    elementwise = operation.rule is rules.same
    inputs[:] = as_channels(units, node, inputs, operation.rule)
    check_beside(node, inputs, elementwise)
    found = kept_beside(node, inputs, operation.rule(units, node, inputs, out, own))
    return carried(units, node, inputs, found, operation.run, elementwise, own)


def _input(units: Units, node: Node, example: tuple[int, ...]) -> Value:
    shape = torch.Size(example)
    if len(example) < 2 or node.attributes.get("integers"):
        return Value(torch.full([1] * len(example), -1), (), shape, True)
    labels = units.new(example[1], "input").view([-1 if d == 1 else 1 for d in range(len(example))])
    units.fixed.append(labels)
    return Value(labels, (1,), shape, True)
