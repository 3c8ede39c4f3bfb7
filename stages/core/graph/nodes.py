"""A network as a short list of named operations: what a trace gives, a sweep runs and a merged file stores.

How each operation runs and where it keeps units is in stages.core.graph.operations and stages.core.graph.rules.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from stages.core.runtime.errors import InputError

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
COPIED = ("mix", "along")  # linear maps beside the units, with one weight for all of these
REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "length", "prod", "median", "kthvalue", "logsumexp")
# length: the root of the sum of squares, or of other powers
POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
ADAPTIVE = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
            "adaptive_max_pool1d", "adaptive_max_pool2d")  # fmt: skip
SQUASHING = ("softmax", "log_softmax", "sigmoid", "tanh", "exp", "softplus", "log_sigmoid")
BEHIND_HEAD = (  # what may stand between the last linear map and the output, class by class or over all classes
    *SQUASHING, "batch_norm", "scale", "shift", "divide_by", "power", "clamp", "clamp_min", "sqrt", "relu",
    "neg", "hardtanh",
    "multiply_parameter", "divide_parameter", "add_parameter",
    *POOLS, *ADAPTIVE, "interpolate", "mean", "sum", "amax", "amin", "select",  # over places with logits each
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operation. ``parameters`` maps a role (weight, bias, ...) to a name in the state dict."""

    name: str
    operation: str
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether every output of the node reads every input channel: Linear, or a convolution with one group."""
        return self.fitted and "weight" in self.parameters and not self.grouped

    @property
    def grouped(self) -> bool:
        """Whether it is a convolution whose outputs read a part of the input channels each."""
        return self.fitted and self.attributes.get("groups", 1) > 1

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution, whose weight is (d_in, d_out, ...)."""
        return self.operation in TRANSPOSED

    @property
    def path(self) -> str:
        """The module path of its weights, or else of another parameter; the node's name where there is none."""
        name = self.parameters.get("weight") or next(iter(self.parameters.values()), "")
        return name.rpartition(".")[0] or self.name

    @property
    def fitted(self) -> bool:
        """Whether the node is a linear map, which is fitted by least squares."""
        return self.operation in ("linear", *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True)
class Graph:
    """Nodes in the order they run; the first is the input, the last one's value is the output."""

    nodes: tuple[Node, ...]

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    @property
    def head(self) -> Node | None:
        """The last linear map, if all that follows acts on its logits: softmax, a temperature, a norm, a mean over
        places."""
        by_name = {node.name: node for node in self.nodes}
        node = self.output
        while (node.operation in BEHIND_HEAD or _keeps_apart(node)) and len(node.inputs) == 1:
            node = by_name[node.inputs[0]]
        return node if node.linear else None

    @property
    def tail(self) -> tuple[Node, ...]:
        """What follows the head, in order."""
        head = self.head
        return () if head is None else self.nodes[self.nodes.index(head) + 1 :]

    @property
    def logits(self) -> set[str]:
        """Values that hold one entry for each class: the head's and those behind it, or the output."""
        head = self.head
        return {self.output.name} if head is None else {head.name, *(node.name for node in self.tail)}

    @property
    def scores(self) -> Node:
        """Whose values a softmax reads: the head, with what follows it up to the first that squashes, or the output."""
        found = self.head or self.output
        for node in self.tail:
            if node.operation in SQUASHING:
                break
            found = node
        return found

    def users(self) -> dict[str, list[Node]]:
        """For each node the nodes that read its value."""
        users: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return users

    def last_uses(self) -> dict[str, list[str]]:
        """For each node the values that nothing reads after it."""
        last: dict[str, str] = {}
        for node in self.nodes:
            for name in node.inputs:
                last[name] = node.name
        uses: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for name, user in last.items():
            uses[user].append(name)
        return uses


def _keeps_apart(node: Node) -> bool:
    """Whether a node only turns dimensions, drops those of one entry or adds some."""
    if node.operation != "rearrange":
        return False
    sizes = [
        atom + (free == i)  # images count as more than one
        for atoms, free in zip(node.attributes["atoms"], node.attributes["free"], strict=True)
        for i, atom in enumerate(atoms)
    ]
    starts = [0, *itertools.accumulate(node.attributes["groups"])]
    joined = [node.attributes["order"][a:b] for a, b in itertools.pairwise(starts)]
    whole = all(sum(atom > 1 for atom in atoms) <= 1 for atoms in node.attributes["atoms"])
    return whole and all(sum(sizes[i] > 1 for i in own) <= 1 for own in joined)


def oriented(node: Node, weight: Tensor) -> Tensor:
    """A linear map's weight as (d_out, d_in, ...): a transposed convolution has it the other way round."""
    return weight.transpose(0, 1) if node.transposed else weight


def node_parameters(node: Node, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A node's parameters by role, out of a state dict."""
    return {role: state[name] for role, name in node.parameters.items()}


def graph_to_json(graph: Graph) -> list[dict[str, Any]]:
    """A graph as lists, texts and numbers, one mapping a node."""
    return [asdict(node) for node in graph.nodes]


def graph_from_json(nodes: Sequence[Mapping[str, Any]]) -> Graph:
    """The graph that ``graph_to_json`` wrote."""
    return Graph(tuple(Node(**{**node, "inputs": tuple(node["inputs"])}) for node in nodes))


MOST_NUMBERS = 2**33  # of one image's value, of a tensor: more is no network of images


def check_graph(
    graph: Graph,
    parameters: Mapping[str, Sequence[int]],
    example: Sequence[int],
    known: Mapping[str, Any],
) -> None:
    """Gate: a graph from a file is data. Raises InputError for what cannot be run, before anything is allocated."""
    seen: set[str] = set()
    sizes = [("the example", example), *parameters.items(), *_sizes(graph)]
    for name, shape in sizes:
        whole = all(isinstance(n, int) and n >= -1 for n in shape)
        if not whole or math.prod(max(abs(n), 1) for n in shape) > MOST_NUMBERS:
            raise InputError(
                f"{name}: found shape {tuple(shape)}; allowed: whole numbers, {MOST_NUMBERS} entries"
            )
    if not graph.nodes or graph.nodes[0].operation != "input":
        raise InputError("graph: has no input; allowed: an input first")
    for number, node in enumerate(graph.nodes):
        if number and node.operation not in known:
            raise InputError(f"{node.name}: no rule for {node.operation}; allowed: operations of the table")
        missing = [name for name in node.inputs if name not in seen]
        missing += [name for name in node.parameters.values() if name not in parameters]
        if missing or node.name in seen or (number and not node.inputs):
            what = (
                f"reads {missing[0]!r}, which is not there" if missing else "is there twice or reads nothing"
            )
            raise InputError(f"{node.name}: {what}; allowed: values and tensors from before")
        seen.add(node.name)


def _sizes(graph: Graph) -> list[tuple[str, Sequence[int]]]:
    """What nodes say about sizes."""
    return [
        (node.name, [abs(n) for n in value])
        for node in graph.nodes
        for key, value in node.attributes.items()
        if key in ("sizes", "pad", "output_size", "size") and isinstance(value, list | tuple)
        if all(isinstance(n, int) for n in value)
    ]
