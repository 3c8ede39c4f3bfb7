"""A module's forward as a graph of named operations, read off its torch.fx trace.

Modules, functions and methods that mean the same become the same operation. Nothing is guessed: what is not listed
here is an error that names it.
"""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from stages.core.errors import InputError
from stages.core.graph import OPERATIONS, Graph, Node

Recipe = tuple[str, dict[str, Any], tuple[str, ...]]  # operation, attributes, parameter roles
ALIAS = "alias"  # passes its input on

MODULES: dict[type[nn.Module], Callable[[Any], Recipe]] = {
    nn.Identity: lambda m: (ALIAS, {}, ()),
    nn.Dropout: lambda m: (ALIAS, {}, ()),
    nn.Dropout2d: lambda m: (ALIAS, {}, ()),
    nn.Linear: lambda m: ("linear", {}, ("weight", "bias")),
    nn.Conv2d: lambda m: ("conv2d", _conv_attributes(m), ("weight", "bias")),
    nn.BatchNorm1d: lambda m: ("batch_norm", {"eps": m.eps}, _NORM),
    nn.BatchNorm2d: lambda m: ("batch_norm", {"eps": m.eps}, _NORM),
    nn.Flatten: lambda m: _flatten(m.start_dim, m.end_dim),
    nn.MaxPool2d: lambda m: ("max_pool2d", _pool_attributes(m) | {"dilation": m.dilation}, ()),
    nn.AvgPool2d: lambda m: (
        "avg_pool2d",
        _pool_attributes(m) | {"count_include_pad": m.count_include_pad},
        (),
    ),
    nn.AdaptiveAvgPool2d: lambda m: ("adaptive_avg_pool2d", {"output_size": m.output_size}, ()),
    nn.AdaptiveMaxPool2d: lambda m: ("adaptive_max_pool2d", {"output_size": m.output_size}, ()),
    nn.ReLU: lambda m: ("relu", {}, ()),
    nn.ReLU6: lambda m: ("relu6", {}, ()),
    nn.GELU: lambda m: ("gelu", {"approximate": m.approximate}, ()),
    nn.SiLU: lambda m: ("silu", {}, ()),
    nn.LeakyReLU: lambda m: ("leaky_relu", {"negative_slope": m.negative_slope}, ()),
    nn.ELU: lambda m: ("elu", {"alpha": m.alpha}, ()),
    nn.Hardswish: lambda m: ("hardswish", {}, ()),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", {}, ()),
    nn.Mish: lambda m: ("mish", {}, ()),
    nn.Sigmoid: lambda m: ("sigmoid", {}, ()),
    nn.Tanh: lambda m: ("tanh", {}, ()),
}
_NORM = ("weight", "bias", "running_mean", "running_var")

# Functions and methods of one name mean the same: (operation, names of the arguments after the input).
CALLS: dict[Any, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), ("relu", ())),
    **dict.fromkeys((torch.sigmoid, "sigmoid"), ("sigmoid", ())),
    **dict.fromkeys((torch.tanh, "tanh"), ("tanh", ())),
    F.relu6: ("relu6", ()),
    F.gelu: ("gelu", ("approximate",)),
    F.silu: ("silu", ()),
    F.leaky_relu: ("leaky_relu", ("negative_slope",)),
    F.elu: ("elu", ("alpha",)),
    F.hardswish: ("hardswish", ()),
    F.hardsigmoid: ("hardsigmoid", ()),
    F.mish: ("mish", ()),
    F.max_pool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    F.avg_pool2d: ("avg_pool2d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", ("output_size",)),
    F.adaptive_max_pool2d: ("adaptive_max_pool2d", ("output_size",)),
    **dict.fromkeys((F.dropout, F.dropout2d, "contiguous"), (ALIAS, ("p", "training", "inplace"))),
    **dict.fromkeys((torch.flatten, "flatten"), ("flatten", ("start_dim", "end_dim"))),
    **dict.fromkeys((torch.mean, "mean"), ("mean", ("dim", "keepdim"))),
    **dict.fromkeys((torch.cat, torch.concat), ("concatenate", ("dim",))),
}
BINARY: dict[Any, tuple[str, str]] = {  # (on two values, on a value and a number)
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), ("add", "shift")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), ("multiply", "scale")),
}


def read_graph(module: nn.Module) -> Graph:
    """Read a module, which is left as it is.

    Raises InputError naming the operation and the module's path when there is no rule for it.
    """
    module = copy.deepcopy(module).eval()
    try:
        traced = torch.fx.symbolic_trace(module)
    except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{type(module).__name__}: cannot be traced ({error}); allowed: a forward without branches on values"
        ) from error
    return Graph(tuple(_Reader(traced).read()))


class _Reader:
    """Reads a torch.fx graph into nodes."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.alias: dict[str, str] = {}
        self.sizes: dict[
            str, tuple[str, int | None]
        ] = {}  # x.shape or x.size(0): which value, which dimension
        self.used: dict[int, str] = {}  # parameters by identity: tied ones have two names

    def read(self) -> list[Node]:
        nodes = []
        for fx in self.traced.graph.nodes:
            if fx.op == "placeholder":
                if nodes:
                    raise InputError(f"{fx.target}: a second input; allowed: networks of one input")
                nodes.append(Node(fx.name, "input"))
            elif fx.op == "output":
                if not isinstance(fx.args[0], torch.fx.Node):
                    raise InputError("the network returns several values; allowed: one tensor")
                nodes = _upto(nodes, self._name(fx.args[0]))
            elif not self._size(fx):
                node = self._node(fx)
                if node is not None:
                    nodes.append(node)
        return nodes

    def _name(self, fx: torch.fx.Node) -> str:
        return self.alias.get(fx.name, fx.name)

    def _node(self, fx: torch.fx.Node) -> Node | None:
        if fx.op != "get_attr" and not fx.args:
            raise self._unknown(fx, f"{fx.target} whose input is given by keyword")
        if fx.op == "call_module":
            operation, attributes, roles = self._module(fx)
            inputs = fx.args
        elif fx.op in ("call_function", "call_method"):
            operation, attributes, inputs = self._call(fx)
            roles = ()
        else:
            raise self._unknown(fx, f"parameter {fx.target} read directly")
        if any(not isinstance(i, torch.fx.Node) or i.name in self.sizes for i in inputs):
            raise self._unknown(fx, f"{operation} of something that is not a value of the network")
        if operation == ALIAS:
            self.alias[fx.name] = self._name(inputs[0])
            return None
        parameters = {}
        for role in roles:
            tensor = getattr(self.modules[fx.target], role)
            if tensor is not None:
                parameters[role] = name = f"{fx.target}.{role}"
                if id(tensor) in self.used:
                    raise self._unknown(fx, f"{name} used a second time (first in {self.used[id(tensor)]})")
                self.used[id(tensor)] = fx.name
        return Node(fx.name, operation, tuple(self._name(i) for i in inputs), attributes, parameters)

    def _module(self, fx: torch.fx.Node) -> Recipe:
        module = self.modules[fx.target]
        if type(module) not in MODULES:
            raise self._unknown(fx, f"module {type(module).__name__}")
        recipe = MODULES[type(module)](module)
        if recipe[0] == "batch_norm" and module.running_mean is None:
            raise self._unknown(fx, "batch norm without running statistics")
        if recipe[0] == "conv2d" and (module.groups != 1 or module.padding_mode != "zeros"):
            raise self._unknown(
                fx, f"convolution with groups={module.groups}, padding_mode={module.padding_mode!r}"
            )
        return recipe

    def _call(self, fx: torch.fx.Node) -> tuple[str, dict[str, Any], tuple[torch.fx.Node, ...]]:
        if fx.target in BINARY:
            return self._binary(fx)
        if fx.target in ("view", "reshape") or fx.target is torch.reshape:
            return self._reshape(fx)
        if fx.target not in CALLS:
            raise self._unknown(fx, f"operation {getattr(fx.target, '__name__', fx.target)}")
        operation, names = CALLS[fx.target]
        given = dict(zip(names, fx.args[1:], strict=False)) | dict(fx.kwargs)
        given.pop("inplace", None)
        if given.get("return_indices") is False:
            del given["return_indices"]
        surplus = [*fx.args[1 + len(names) :], *(given.keys() - names)]
        if surplus:
            raise self._unknown(fx, f"{operation} with {surplus[0]}")
        if any(isinstance(value, torch.fx.Node) for value in given.values()):
            raise self._unknown(fx, f"{operation} whose settings depend on a value")
        inputs = tuple(fx.args[0]) if operation == "concatenate" else (fx.args[0],)
        if operation == "flatten":
            operation, given, _ = _flatten(given.get("start_dim", 0), given.get("end_dim", -1))
        elif operation == "mean":
            dims = given.get("dim")
            given = {"dims": list(dims) if isinstance(dims, tuple | list) else [dims]}
            given["keepdim"] = bool(fx.kwargs.get("keepdim", fx.args[2] if len(fx.args) > 2 else False))
            if given["dims"] == [None]:
                raise self._unknown(fx, "mean over everything")
        elif operation == "concatenate":
            given.setdefault("dim", 0)
        elif operation == ALIAS:
            given = {}
        return operation, given, inputs

    def _binary(self, fx: torch.fx.Node) -> tuple[str, dict[str, Any], tuple[torch.fx.Node, ...]]:
        joined, single = BINARY[fx.target]
        values = tuple(arg for arg in fx.args if isinstance(arg, torch.fx.Node))
        numbers = [arg for arg in fx.args if isinstance(arg, int | float)]
        if len(fx.args) != 2 or fx.kwargs or len(values) + len(numbers) != 2 or not values:
            raise self._unknown(fx, f"{joined} of {len(fx.args)} arguments")
        if numbers:
            return single, {"value": numbers[0]}, values
        return joined, {}, values

    def _reshape(self, fx: torch.fx.Node) -> tuple[str, dict[str, Any], tuple[torch.fx.Node, ...]]:
        """Only x.view(x.size(0), -1), which is a flatten."""
        shape = fx.args[1:]
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        first = self.sizes.get(getattr(shape[0], "name", "")) if shape else None
        if first != (self._name(fx.args[0]), 0) or shape[1:] != (-1,) or fx.kwargs:
            what = getattr(fx.target, "__name__", fx.target)
            raise self._unknown(fx, f"{what} to ({', '.join(map(str, shape))})")
        return "flatten", {}, (fx.args[0],)

    def _size(self, fx: torch.fx.Node) -> bool:
        """Remember x.size(), x.shape and one entry of them; they are no operations."""
        if fx.op not in ("call_function", "call_method"):
            return False
        if fx.target == "size" or (fx.target is getattr and fx.args[1] == "shape"):
            dim = fx.args[1] if fx.target == "size" and len(fx.args) > 1 else fx.kwargs.get("dim")
            self.sizes[fx.name] = (self._name(fx.args[0]), dim)
        elif fx.target is operator.getitem and getattr(fx.args[0], "name", None) in self.sizes:
            self.sizes[fx.name] = (self.sizes[fx.args[0].name][0], fx.args[1])
        return fx.name in self.sizes

    def _unknown(self, fx: torch.fx.Node, what: str) -> InputError:
        stack = fx.meta.get("nn_module_stack") or {}
        path = (
            str(fx.target)
            if fx.op == "call_module"
            else (list(stack)[-1] if stack else "the network's forward")
        )
        return InputError(
            f"{path or 'the network'}: no rule for {what} ({fx.name}); allowed: "
            f"{', '.join(sorted(OPERATIONS))}; rewrite it with these, or add a rule to stages/core/graph.py"
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


def _flatten(start: int, end: int) -> Recipe:
    if (start, end) != (1, -1):
        raise InputError(f"flatten from {start} to {end}; allowed: from 1 to -1")
    return "flatten", {}, ()


def _conv_attributes(m: nn.Conv2d) -> dict[str, Any]:
    padding = m.padding if isinstance(m.padding, str) else list(m.padding)
    return {"stride": list(m.stride), "padding": padding, "dilation": list(m.dilation)}


def _pool_attributes(m: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {"kernel_size": m.kernel_size, "stride": m.stride, "padding": m.padding, "ceil_mode": m.ceil_mode}
