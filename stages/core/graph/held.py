"""What no rule can keep in another order than the sources': it is read all the same, and *held*.

The units that such an operation reads are fixed, and what it gives has units of its own, which are fixed too: they are
shared at every budget, and everything else may be separate. A layer that reads them has outputs of its own again.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch

from stages.core.graph import rules
from stages.core.graph.axes import HELD_NAME, Units, Value
from stages.core.graph.nodes import Node
from stages.core.runtime.errors import InputError

log = logging.getLogger(__name__)
BY_LAST = ("linear", "layer_norm")  # what reads the last dimension
BY_SECOND = ("batch_norm", "batch_statistics", "group_norm", "prelu")  # and convolutions
MEET = ("matmul", "attention", "grid_sample")  # entries of one value with those of another


class Held:
    """Which operations of a graph are held, by name, and why: of those that were refused."""

    def __init__(self) -> None:
        self.nodes: dict[str, InputError] = {}
        self._later: dict[str, InputError] = {}
        self._before: set[str] = set()  # held from the start of this try
        self._of: dict[str, str] = {}  # of nodes that were made of another, that

    @contextlib.contextmanager
    def instead(self, node: Node) -> Iterator[None]:
        """What is refused inside is held."""
        try:
            yield
        except InputError as error:
            self.nodes[node.name] = error
            if node.name in self._of:  # what it was made of is held, as it was read
                self._later[self._of[node.name]] = error

    def made(self, node: Node, nodes: Sequence[Node]) -> None:
        """Nodes that were put in the place of one."""
        self._of |= {own.name: self._of.get(node.name, node.name) for own in nodes}

    @contextlib.contextmanager
    def later(self, node: Node) -> Iterator[None]:
        """The same of what is only seen when the whole graph is laid out: it is, once more, with that held."""
        try:
            yield
        except InputError as error:
            self._later[self._of.get(node.name, node.name)] = error

    @contextlib.contextmanager
    def lifted(self, node: Node, before: Mapping[str, Node]) -> Iterator[None]:
        """Products may have been given a dimension for their one head: they are held where that cannot be read.

        before: the nodes that were laid out, by name.
        """
        try:
            yield
        except InputError as error:
            waiting, seen = list(node.inputs), set()
            where = str(error).partition(": ")[0]
            seen_again = InputError(f"{where}: {node.operation} of a product of units with units")
            while waiting:
                name = waiting.pop()
                product = before[name].operation in ("matmul", "attention") and name not in self._before
                if name not in seen and product:
                    self._later[name] = seen_again
                elif name not in seen:
                    waiting += before[name].inputs
                seen.add(name)
            raise

    @contextlib.contextmanager
    def until_known(self) -> Iterator[None]:
        """An error that is known by now to come of something that has to be held ends this try alone."""
        try:
            yield
        except InputError:
            if not self._later:
                raise

    def again(self) -> bool:
        """Whether the graph has to be laid out once more. Raises the error where nothing new would be held then."""
        if not self._later:
            return False
        self.nodes |= self._later
        if self.nodes.keys() == self._before:
            raise next(iter(self._later.values()))
        self._before, self._later = set(self.nodes), {}
        return True

    def reads(self, units: Units, node: Node, inputs: list[Value]) -> bool:
        """Units of held values are on whatever dimension a layer or a norm reads; whether the first value's moved."""
        dim = _dim_read(node, inputs)
        if dim is None or inputs[0].dims == (dim,) or not (inputs[0].held or node.name in self.nodes):
            return False
        _fix(units, inputs[:1])
        inputs[0] = _fixed_on(units, node, dim, inputs[0].shape)
        return True

    def as_it_is(self, node: Node, inputs: Sequence[Value]) -> list[Node]:
        """The node alone where it is held, or reads nothing but what is held, or meets it in a product or side by side
        on another dimension."""
        own = [value for value in inputs if not value.common]
        apart = node.operation == "concatenate" and len({value.dims for value in own}) > 1
        met = any(value.held for value in own) and (
            apart or node.operation in MEET or all(value.held for value in own)
        )
        whole = met and _dim_read(node, inputs) is None
        alike = not own and node.operation in MEET  # made of the input alone
        return [node] if whole or (node.name in self.nodes and not alike) else []

    def value(self, units: Units, node: Node, inputs: list[Value], out: torch.Size) -> Value:
        """What a held operation gives."""
        _fix(units, inputs)
        # of one image: images do not come first, and may be on the second dimension
        elsewhere = out[:1] != (1,)
        last = node.operation in BY_LAST or ((len(out) < 4 or elsewhere) and not node.fitted)
        return _fixed_on(units, node, len(out) - 1 if last else 1, out)

    def told(self) -> None:
        """Say in the log what is held, and why: once for what is held alike."""
        alike: dict[str, list[str]] = {}
        for error in self.nodes.values():
            place, _, why = str(error).partition("; allowed: ")[0].partition(": ")
            alike.setdefault(why, []).append(place)
        for why, (place, *more) in alike.items():
            others = f" and {len(more)} more" if more else ""
            log.warning("%s%s: %s; its units keep their order and are shared", place, others, why)


class _Nothing(Held):
    """What has no rule is refused."""

    def instead(self, node: Node) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    later = instead

    def made(self, node: Node, nodes: Sequence[Node]) -> None:
        pass

    def lifted(self, node: Node, before: Mapping[str, Node]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


NOTHING = _Nothing()


def _dim_read(node: Node, inputs: Sequence[Value]) -> int | None:
    """The one dimension whose units a layer or a norm reads."""
    if not inputs:
        return None
    if node.operation in BY_LAST:
        return len(inputs[0].shape) - 1
    return 1 if node.fitted or node.operation in BY_SECOND else None


def _fix(units: Units, values: Sequence[Value]) -> None:
    for value in values:
        units.fixed += [own for own in (value.labels, value.beside, value.across) if own is not None]


def _fixed_on(units: Units, node: Node, dim: int, shape: torch.Size) -> Value:
    new = units.new(shape[dim], f"{node.name}{HELD_NAME}")
    units.fixed.append(new)
    return dataclasses.replace(rules.on_dim(new, dim, shape), held=True)
