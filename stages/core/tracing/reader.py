"""The state of reading one graph: which node stands for which call, and what is known without an input."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from stages.core.graph.nodes import Node
from stages.core.graph.places import CodePlace
from stages.core.runtime.errors import InputError
from stages.core.tracing.export import opname
from stages.core.tracing.folding import Folding, made_like
from stages.core.tracing.one_by_one import INPUT
from stages.core.tracing.rearranging import Factors

SKIPPED = {
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "clone", "alias", "contiguous", "detach",
    "lift_fresh_copy", "lift_fresh", "_to_copy", "to", "type_as", "conj", "resolve_conj", "expand_as_",
    "native_dropout", "_assert_tensor_metadata",
}  # fmt: skip
RESHAPES = {
    "view",
    "reshape",
    "reshape_as",
    "view_as",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "_reshape_alias",
    "view_copy",
}


Call = Callable[
    ["Reader", torch.fx.Node, Mapping[str, Any]], None
]  # makes nodes of a call, from its arguments by name


class Reader:
    """Reads one graph. ``names``: of the node that stands for a call; several values: calls that give a tuple."""

    def __init__(
        self, module: nn.Module, graph: torch.fx.Graph, folding: Folding, calls: Mapping[str, Call]
    ) -> None:
        """calls: by ATen name."""
        self.module, self.graph, self.folding, self.calls = module, graph, folding, calls
        self.nodes: list[Node] = []
        self.names: dict[torch.fx.Node, str] = {}
        self.made_of: dict[str, torch.fx.Node] = {}
        self.taken: set[str] = set()
        self.factors: dict[torch.fx.Node, tuple[torch.fx.Node, Factors]] = {}
        self.same: dict[torch.fx.Node, torch.fx.Node] = {}  # passes on what another call gives
        self.known: set[torch.fx.Node] = set()
        self.skipped: set[torch.fx.Node] = set()
        self.parts: dict[tuple[torch.fx.Node, int], Callable[[torch.fx.Node], None]] = {}

    def read(self) -> list[Node]:
        for fx in self.graph.nodes:
            self.at = fx
            if fx.op == "placeholder":
                if fx.name in self.folding.tensors:
                    self.known.add(fx)
                elif not self.nodes:
                    integers = not fx.meta["val"].is_floating_point()
                    self.node(fx, "input", [], {"integers": True} if integers else {}, name=fx.name)
                else:
                    raise InputError(f"{fx.name}: a second input; allowed: networks of one input")
            elif fx.op == "get_attr":
                self.known.add(fx)
                self.folding.tensors[fx.name] = getattr(self.graph.owning_module, str(fx.target))
            elif fx.op == "output":
                return self._finished(fx)
            elif fx.op != "call_function":
                raise self.unknown(fx, str(fx.target))
            elif fx in self.skipped:
                continue
            elif made_like(fx) or all(n in self.known for n in fx.all_input_nodes):
                self.known.add(fx)
            else:
                self._read(fx)
        raise InputError(f"{type(self.module).__name__}: returns nothing; allowed: one tensor")

    def _finished(self, fx: torch.fx.Node) -> list[Node]:
        found = torch.fx.node.map_aggregate(fx.args[0], lambda a: a)
        flat = [
            a for a in (found if isinstance(found, tuple | list) else [found]) if isinstance(a, torch.fx.Node)
        ]
        if len(flat) != 1:
            raise InputError(f"the network returns several values ({len(flat)}); allowed: one tensor")
        if flat[0] in self.known:
            raise InputError("the network's output does not depend on its input; allowed: networks")
        return _upto(self.nodes, self.value(flat[0]))

    def add(self, node: Node, fx: torch.fx.Node | None = None) -> None:
        """One more node, of a name of its own. fx: the call it comes from, by default that which is read now."""
        self.nodes.append(node)
        self.taken.add(node.name)
        self.made_of[node.name] = fx or self.at

    def node(
        self,
        fx: torch.fx.Node,
        operation: str,
        inputs: Sequence[torch.fx.Node],
        attributes: Mapping[str, Any] | None = None,
        parameters: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        """One more node, which stands for a call. parameters: state names by role."""
        values = tuple(self.value(i) for i in inputs)
        name = name or self.name(fx, parameters or {})
        self.add(Node(name, operation, values, dict(attributes or {}), dict(parameters or {})), fx)
        self.names[fx] = name

    def name(self, fx: torch.fx.Node, parameters: Mapping[str, str]) -> str:
        """A name that is not taken: the module's path where there is one."""
        name = fx.name
        if "weight" in parameters and not parameters["weight"].startswith("folded."):
            name = parameters["weight"].rpartition(".")[0].replace(".", "_") or name
        while name in self.taken:
            name += "_again" if name != fx.name else "_"
        return name

    def value(self, fx: torch.fx.Node) -> str:
        """The name of the node that gives a value, made now where it only moves entries."""
        fx = self.through(fx)
        if fx in self.names:
            return self.names[fx]
        if fx in self.known:
            self._as_value(fx)
            return self.value(fx)
        if fx not in self.factors:
            raise self.unknown(fx, f"{opname(fx)} of several values")
        source, factors = self.factors[fx]
        if factors.plain():
            return self.value(source)
        self.node(fx, "rearrange", [source], factors.attributes())
        return self.names[fx]

    def _as_value(self, fx: torch.fx.Node) -> None:
        """What depends on parameters and constants alone in the place of a value (learned queries, coordinates).

        What was made of a parameter after it was given images is read as of any value; before, it is folded.
        """
        of = [n for n in fx.all_input_nodes if n in self.known and images_at(n.meta["val"]) is not None]
        self.known.discard(fx)
        if of and self.from_parameters(fx):
            for inner in of:
                self._as_value(inner)
            before, self.at = self.at, fx
            self._read(fx)
            self.at = before
            return
        value = fx.meta["val"]
        images = images_at(value)
        if images is None and not (value.dim() and value.shape[0] == 1):
            raise self.unknown(fx, "a constant in the place of a value")
        settings: dict[str, Any] = {"images": images or 0, "rank": value.dim()}
        if not self.from_parameters(fx):
            found = self.folding.value(fx, self.module)
            settings |= {"common": True, "even": bool((found == found.flatten()[:1]).all())}
        name, parameters = self.name(fx, {}), {"value": self.folding.want(fx)}
        self.add(Node(name, "constant_parameter", (self.nodes[0].name,), settings, parameters), fx)
        self.names[fx] = name

    def through(self, fx: torch.fx.Node) -> torch.fx.Node:
        """The call that gives what a call passes on."""
        while fx in self.same:
            fx = self.same[fx]
        return fx

    def shape(self, fx: torch.fx.Node) -> list[int]:
        """Of what a call gives, for ``INPUT`` images; of the first where it gives several."""
        found = fx.meta["val"]
        return list((found[0] if isinstance(found, tuple | list) else found).shape)

    def _read(self, fx: torch.fx.Node) -> None:
        name = opname(fx)
        call = self.calls.get(name, self.calls.get(name.strip("_")))
        if name in SKIPPED:
            if fx.users:
                before = fx.args[0].meta["val"]
                whole = not before.is_floating_point() and before.dtype != torch.bool
                whole &= "integers" in self.nodes[0].attributes  # what is counted is of the values' type
                if whole and fx.meta["val"].is_floating_point():
                    where = place_of(fx, type(self.module).__name__)
                    raise where.refusal(
                        "whole numbers made floats", "the same images as floats, images.float()"
                    )
                self.same[fx] = fx.args[0]
        elif call is not None:
            call(self, fx, self._arguments(fx))
        elif fx.users and not name.startswith(("sym_", "_assert")):
            raise self.unknown(fx, name)

    def _arguments(self, fx: torch.fx.Node) -> dict[str, Any]:
        """All arguments of a call by name."""
        schema = getattr(fx.target, "_schema", None)
        if schema is None:
            return {str(i): a for i, a in enumerate(fx.args)}
        given = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
        given |= dict(zip((a.name for a in schema.arguments), fx.args, strict=False))
        return given | dict(fx.kwargs)

    def is_value(self, argument: Any) -> bool:
        """Whether it depends on the input."""
        return isinstance(argument, torch.fx.Node) and self.through(argument) not in self.known

    def parameter(self, argument: Any) -> str:
        """The state name of a parameter, or of what is computed from some."""
        return self.folding.want(self.through(argument))

    def roles(self, fx: torch.fx.Node, given: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, str]:
        """Parameters among the arguments: {role: state name}."""
        found = {}
        for role, argument in roles.items():
            if given.get(argument) is not None:
                if self.is_value(given[argument]):
                    raise self.unknown(fx, f"{opname(fx)} whose {role} depends on the input")
                found[role] = self.parameter(given[argument])
        return found

    def seen(self, lone: torch.fx.Node) -> tuple[str, list[int]]:
        """A parameter of one dimension that is only viewed as (1, d, 1, 1) stays what it is in the state dict."""
        at = self.through(lone)
        while at.op == "call_function" and opname(at) in RESHAPES | SKIPPED and at.args[0] in self.known:
            at = at.args[0]
        own = self.folding.tensors.get(at.name)
        shape = self.shape(lone)
        if (
            isinstance(own, str)
            and at.meta["val"].is_floating_point()
            and at is not lone
            and len(self.shape(at)) == 1
            and sum(n > 1 for n in shape) == 1
        ):
            return own, [1 if n == 1 else -1 for n in shape]
        return self.parameter(lone), []

    def number(self, argument: Any) -> Any:
        """A constant of no dimension as a number, unless it is a parameter or comes from one."""
        if not isinstance(argument, torch.fx.Node) or self.is_value(argument):
            return argument
        fx = self.through(argument)
        if self.shape(fx) or self.from_parameters(fx):
            return fx
        return self.folding.value(fx, self.module).item()

    def one_number(self, argument: Any) -> Any:
        """The same of a constant whose entries are all one number, as a tensor that is made like a value."""
        found = self.number(argument)
        if not isinstance(found, torch.fx.Node) or self.is_value(found) or self.from_parameters(found):
            return found
        entries = self.folding.value(found, self.module).flatten()
        return entries[0].item() if len(entries) and bool((entries == entries[0]).all()) else found

    def from_parameters(self, fx: torch.fx.Node) -> bool:
        """Whether a constant is computed from a tensor of the state."""
        stack, seen = [fx], set()
        while stack:
            node = stack.pop()
            if isinstance(self.folding.tensors.get(node.name), str):
                return True
            seen.add(node)
            stack += [n for n in node.all_input_nodes if n not in seen and not made_like(node)]
        return False

    def arranged(
        self, name: str, value: str, found: str, groups: Sequence[str], sizes: Mapping[str, int]
    ) -> str:
        """A value of dimensions ``found``, letters of these sizes, with those of each group as one dimension."""
        if [*found] == [*groups]:
            return value
        factors = Factors.of([sizes[c] for c in found])
        factors.permute([found.index(c) for c in "".join(groups)])
        _reshape(factors, [math.prod(sizes[c] for c in group) for group in groups])
        self.add(Node(name, "rearrange", (value,), factors.attributes()))
        return name

    def spread(self, name: str, value: str, groups: Sequence[str], out: str, sizes: Mapping[str, int]) -> str:
        """The inverse: groups of dimensions apart, in the order of ``out``."""
        if [*groups] == [*out]:
            return value
        line = "".join(groups)
        factors = Factors.of([math.prod(sizes[c] for c in group) for group in groups])
        _reshape(factors, [sizes[c] for c in line])
        factors.permute([line.index(c) for c in out])
        self.add(Node(name, "rearrange", (value,), factors.attributes()))
        return name

    def unknown(self, fx: torch.fx.Node, what: str) -> InputError:
        """The refusal: what has no rule, in which module, at which line of the user's."""
        return place_of(fx, type(self.module).__name__).refusal(f"no rule for {what}")


def images_at(value: Any) -> int | None:
    """The dimension that counts images."""
    shape = value.shape if isinstance(value, Tensor) else ()
    return next((d for d, n in enumerate(shape) if n and n % INPUT == 0), None)


def place_of(fx: torch.fx.Node, kind: str) -> CodePlace:
    """The module's path, or the network's ``kind``, and the last line of a call that is not torch's."""
    stack = list((fx.meta.get("nn_module_stack") or {}).values())
    lines = [line.strip() for line in (fx.meta.get("stack_trace") or "").splitlines() if line.strip()]
    where = ""
    if len(lines) > 1:  # `File "net.py", line 12, in forward` and the code
        file, line = lines[-2].split('"')[1], lines[-2].split("line ")[1].split(",")[0]
        if Path(file).is_relative_to(here := Path.cwd()):
            file = Path(file).relative_to(here)
        where = f" at {file}:{line} ({lines[-1]})"
    return CodePlace((stack[-1][0] if stack else "") or kind, where)


def _reshape(factors: Factors, shape: Sequence[int]) -> None:
    if not factors.reshape(shape):
        raise AssertionError(f"dimensions as one, or apart again, are a product: {shape}")


def _upto(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output needs, which is made the last one."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if node.name in needed or node.operation == "input":
            needed.update(node.inputs)
            kept.append(node)
    kept.reverse()
    return sorted(kept, key=lambda node: node.name == output)
