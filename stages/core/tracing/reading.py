"""A module's forward as a graph of named operations, read off its torch.fx trace.

Modules, functions and methods that mean the same become the same operation (stages.core.tracing.vocabulary). Nothing is
guessed: what is not listed there is an error that names it.
"""

import copy
import dataclasses
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from stages.core.graph.nodes import Graph, Node
from stages.core.graph.operations import OPERATIONS
from stages.core.runtime.errors import InputError
from stages.core.tracing.attention import PACKED, Attention, find_attention
from stages.core.tracing.calls import Calls
from stages.core.tracing.shapes import Observed, observe
from stages.core.tracing.vocabulary import ALIAS, BINARY, CALLS, MODULES, RESHAPES, STATE, Reading


def read_graph(module: nn.Module, example: Tensor) -> Graph:
    """Read a module, which is left as it is.

    example: (n, ...), of which the shape counts. Raises InputError naming the operation and the module's path when
    there is no rule for it.
    """
    module = copy.deepcopy(module).eval()
    try:
        traced = _with_one_input(module, torch.fx.symbolic_trace(module, _defaults(module)))
    except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{type(module).__name__}: cannot be traced ({error}); allowed: a forward without branches on values"
        ) from error
    return Graph(tuple(_Reader(module, traced, observe(traced, example)).read()))


def _defaults(module: nn.Module) -> dict[str, Any]:
    """What the arguments of a forward are when it is called with the images alone."""
    arguments = list(inspect.signature(module.forward).parameters.values())[1:]
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}


def _with_one_input(module: nn.Module, traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Arguments that have their defaults are no inputs: the forward saw the values, only checks read the inputs."""
    given = _defaults(module)
    inputs = [fx for fx in traced.graph.nodes if fx.op == "placeholder"]
    for name, fx in list(zip(inspect.signature(module.forward).parameters, inputs, strict=False))[1:]:
        if name in given:
            _erase(traced.graph, fx)
    return traced


def _erase(graph: torch.fx.Graph, fx: torch.fx.Node) -> None:
    for user in list(fx.users):
        _erase(graph, user)
    graph.erase_node(fx)


class _Reader:
    """Reads a torch.fx graph into nodes."""

    def __init__(self, module: nn.Module, traced: torch.fx.GraphModule, observed: Observed) -> None:
        self.traced, self.observed = traced, observed
        self.modules = dict(traced.named_modules())
        self.state = module.state_dict(keep_vars=True)
        self.alias: dict[str, str] = {}
        self.lone: dict[str, str] = {}  # a parameter that is read directly -> its name in the state dict
        self.viewed: dict[str, Sequence[int]] = {}  # the shape a lone parameter is given
        self.used: dict[int, str] = {}  # parameters by identity: tied ones have two names
        self.nodes: list[Node] = []
        self.calls = Calls(observed, self.lone, self._unknown)
        self.attention = dict(find_attention(traced, observed))
        self.skipped = {fx for found in self.attention.values() for fx in found.inside}

    def read(self) -> list[Node]:
        for fx in self.traced.graph.nodes:
            if fx.op == "placeholder":
                if self.nodes:
                    raise InputError(f"{fx.target}: a second input; allowed: networks of one input")
                self.nodes.append(Node(fx.name, "input"))
            elif fx.op == "output":
                if not isinstance(fx.args[0], torch.fx.Node):
                    raise InputError("the network returns several values; allowed: one tensor")
                return _upto(self.nodes, self._name(fx.args[0]))
            elif fx.op == "get_attr":
                self.lone[fx.name] = str(fx.target)
            elif self._multihead(fx):
                self._read_multihead(fx)
            elif fx in self.attention:
                self._read_attention(fx, self.attention[fx])
            elif fx in self.skipped:
                continue
            elif self.observed.tensor(fx):
                self._read(fx)
            if self.observed.failed is fx:
                raise self._failed(fx)
        return self.nodes

    def _name(self, fx: torch.fx.Node) -> str:
        return self.alias.get(fx.name, fx.name)

    def _read(self, fx: torch.fx.Node) -> None:
        if not fx.args:
            raise self._unknown(fx, f"{fx.target} whose input is given by keyword")
        if fx.op == "call_module":
            operation, attributes, roles = self._module(fx)
            inputs, parameters = fx.args, {role: f"{fx.target}.{role}" for role in roles}
        else:
            found = self._with_parameter(fx)
            if found is None:
                return
            operation, attributes, inputs, parameters = found
        if any(not isinstance(i, torch.fx.Node) or not self._value(i) for i in inputs):
            raise self._unknown(fx, f"{operation} of something that is not a value of the network")
        if operation == ALIAS:
            self.alias[fx.name] = self._name(inputs[0])
        else:
            self._append(fx, fx.name, operation, attributes, [self._name(i) for i in inputs], parameters)

    def _append(
        self,
        fx: torch.fx.Node,
        name: str,
        operation: str,
        attributes: dict[str, Any],
        inputs: list[str],
        parameters: dict[str, str],
    ) -> None:
        kept = {}
        for role, parameter in parameters.items():
            tensor = self.state.get(parameter)
            if tensor is not None:
                kept[role] = parameter
                if id(tensor) in self.used:
                    raise self._unknown(
                        fx, f"{parameter} used a second time (first in {self.used[id(tensor)]})"
                    )
                self.used[id(tensor)] = fx.name
        self.nodes.append(Node(name, operation, tuple(inputs), attributes, kept))

    def _value(self, fx: torch.fx.Node) -> bool:
        """Whether a node is a value of the network: a tensor that is no parameter."""
        return fx.name not in self.lone and (self.observed.tensor(fx) or fx.name in self.alias)

    # -- modules ------------------------------------------------------------------------------------------------

    def _module(self, fx: torch.fx.Node) -> Reading:
        module = self.modules[fx.target]
        if type(module) not in MODULES:
            raise self._unknown(fx, f"module {type(module).__name__}")
        recipe = MODULES[type(module)](module)
        if recipe[0] == "batch_norm" and module.running_mean is None:
            raise self._unknown(fx, "batch norm without running statistics")
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise self._unknown(fx, f"convolution with padding_mode={module.padding_mode!r}")
        if recipe[0] == "layer_norm" and len(module.normalized_shape) > 1:
            raise self._unknown(fx, f"layer norm over {len(module.normalized_shape)} dimensions")
        if recipe[0] == "group_norm" and getattr(module, "track_running_stats", False):
            raise self._unknown(fx, "instance norm with running statistics")
        return recipe

    def _multihead(self, fx: torch.fx.Node) -> bool:
        return fx.op == "call_module" and type(self.modules[fx.target]) is nn.MultiheadAttention

    def _read_multihead(self, fx: torch.fx.Node) -> None:
        """Self-attention: one Linear to queries, keys and values, the attention, one Linear out of the heads."""
        module, path = self.modules[fx.target], str(fx.target)
        if len(fx.args) < 3 or not fx.args[0] is fx.args[1] is fx.args[2]:
            raise self._unknown(fx, "attention whose query, key and value are not one tensor")
        given = {"key_padding_mask", "attn_mask", "is_causal"} & {k for k, v in fx.kwargs.items() if v}
        if given or len(fx.args) > 3:
            raise self._unknown(fx, f"attention with {next(iter(given), 'positional settings')}")
        if not module.batch_first or module.bias_k is not None or module.add_zero_attn:
            raise self._unknown(fx, "attention with batch_first=False, bias_k or add_zero_attn")
        for weights in (u for u in fx.users if u.target is not operator.getitem or u.args[1] != 0):
            if weights.users:
                raise self._unknown(fx, "attention whose weights are read; allowed: its first output")
        first, heads, last = f"{fx.name}_in_proj", f"{fx.name}_heads", fx.name
        names = {"weight": f"{path}.in_proj_weight", "bias": f"{path}.in_proj_bias"}
        self._append(fx, first, "linear", {"packed": PACKED}, [self._name(fx.args[0])], names)
        self._append(fx, heads, "attention", {"head_dim": module.head_dim}, [first], {})
        names = {"weight": f"{path}.out_proj.weight", "bias": f"{path}.out_proj.bias"}
        self._append(fx, last, "linear", {}, [heads], names)
        for user in fx.users:
            self.alias[user.name] = last

    def _read_attention(self, fx: torch.fx.Node, found: Attention) -> None:
        name = self._name(found.packed)
        at = next(i for i, node in enumerate(self.nodes) if node.name == name)
        if self.nodes[at].operation != "linear":
            raise self._unknown(fx, "attention whose queries, keys and values are not one Linear's alone")
        self.nodes[at] = dataclasses.replace(self.nodes[at], attributes={"packed": PACKED})
        self._append(fx, fx.name, "attention", {"head_dim": found.head_dim}, [name], {})

    # -- functions and methods ----------------------------------------------------------------------------------

    def _with_parameter(self, fx: torch.fx.Node) -> tuple[Any, ...] | None:
        """(operation, attributes, inputs, parameters); None when there is nothing to run."""
        lone = [arg for arg in fx.all_input_nodes if arg.name in self.lone]
        if fx.name in self.alias:
            return None
        if not lone:
            return *self.calls.read(fx), {}
        if fx.target == "expand" and self.observed.shape(fx)[1:] == tuple(self._tensor(lone[0]).shape[1:]):
            self.lone[fx.name] = self.lone[lone[0].name]  # over the batch: what reads it does that
            return None
        if fx.target in RESHAPES and self._tensor(lone[0]).dim() == 1:
            self.lone[fx.name], self.viewed[fx.name] = self.lone[lone[0].name], self.observed.shape(fx)
            return None
        if fx.target in BINARY and len(lone) == 1 and len(fx.all_input_nodes) == len(fx.args) == 2:
            value = next(arg for arg in fx.args if arg is not lone[0])
            attributes = {"shape": list(self._tensor(lone[0]).shape)}
            if lone[0].name in self.viewed:  # (d,) seen as (1, d, 1, 1)
                attributes["shape"] = shape = list(self.viewed[lone[0].name])
                attributes["view"] = [1 if n == 1 else -1 for n in shape]
            operation = f"{BINARY[fx.target][0]}_parameter"
            return operation, attributes, (value,), {"value": self.lone[lone[0].name]}
        if CALLS.get(fx.target, ("",))[0] == "concatenate":
            return self._concatenate(fx)
        operation = CALLS.get(fx.target, ("",))[0]
        if operation in ("layer_norm", "batch_norm", "linear", "conv2d"):
            _, given, inputs = self.calls.read(fx)
            names = {role: self.lone.get(getattr(given.pop(role, None), "name", "")) for role in STATE}
            return operation, given, inputs, {role: name for role, name in names.items() if name}
        raise self._unknown(fx, f"parameter {self.lone[lone[0].name]} read directly")

    def _tensor(self, fx: torch.fx.Node) -> Tensor:
        name = self.lone[fx.name]
        if name not in self.state:
            raise self._unknown(fx, f"buffer {name}, which is not in the state dict,")
        return self.state[name]

    def _concatenate(self, fx: torch.fx.Node) -> None:
        """Parameters (a class token) before and after one value, one node each."""
        parts = list(fx.args[0])
        values = [i for i, part in enumerate(parts) if part.name not in self.lone]
        dim = fx.args[1] if len(fx.args) > 1 else fx.kwargs.get("dim", 0)
        if len(values) != 1:
            raise self._unknown(fx, f"concatenation of parameters and {len(values)} values")
        at, name = values[0], self._name(parts[values[0]])
        order = [*reversed(parts[:at]), *parts[at + 1 :]]
        for i, part in enumerate(order):
            new = fx.name if i == len(order) - 1 else f"{fx.name}_{i}"
            attributes = {"dim": dim, "first": i < at, "shape": list(self._tensor(part).shape)}
            self._append(
                fx, new, "concatenate_parameter", attributes, [name], {"value": self.lone[part.name]}
            )
            name = new

    # -- refusals -----------------------------------------------------------------------------------------------

    def _failed(self, fx: torch.fx.Node) -> InputError:
        node = self.nodes[-1]
        what = f"{node.name}: {node.operation}" if node.name == fx.name else f"{fx.name}: {fx.target}"
        shapes = ", ".join(str(s) for s in map(self.observed.shape, fx.all_input_nodes) if s is not None)
        return InputError(
            f"{what} cannot run on {shapes} ({self.observed.error}); "
            "allowed: an example of the shape that the network takes"
        )

    def _unknown(self, fx: torch.fx.Node, what: str) -> InputError:
        stack = fx.meta.get("nn_module_stack") or {}
        path = (
            str(fx.target)
            if fx.op == "call_module"
            else (list(stack)[-1] if stack else "the network's forward")
        )
        return InputError(
            f"{path or 'the network'}: no rule for {what} ({fx.name}); allowed: "
            f"{', '.join(sorted(OPERATIONS))}; rewrite it with these, or add a rule to stages/core/graph/rules.py"
        )


def _upto(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output needs, which is made the last one."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if node.name in needed or node.operation == "input":
            needed.update(node.inputs)
            kept.append(node)
    kept.reverse()
    return sorted(kept, key=lambda node: node.name == output)
