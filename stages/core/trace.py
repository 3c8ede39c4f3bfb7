"""nn.Module -> Graph and PermutationSpec, by torch.fx and one small rule per operation.

Nothing is guessed: a module, function or method that is not listed here is an error that names it, and a trace is
verified before it is used (``verify``).
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.errors import InputError
from stages.core.graph import (
    OPERATIONS,
    Graph,
    Groups,
    Layout,
    Node,
    Segment,
    node_parameters,
    run_graph,
    run_node,
)
from stages.core.spec import PermutationGroup, PermutationSpec, permute

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


@dataclass(frozen=True)
class Trace:
    """What is known of an architecture at one input size.

    layouts and shapes are by node name; shapes are those of one image, (1, ...). parameters: the shape of each
    tensor of the state dict.
    """

    graph: Graph
    spec: PermutationSpec
    layouts: Mapping[str, Layout]
    shapes: Mapping[str, torch.Size]
    parameters: Mapping[str, tuple[int, ...]]

    def positions(self, node: Node) -> int:
        """How often a linear map is applied to one image: its multiply-accumulates are positions * weights."""
        return self.shapes[node.name].numel() // self.layouts[node.name].width


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Trace a network.

    example: a batch of the input's shape, (n, ...); its values do not matter. The module is left as it is.
    Raises InputError naming the operation and the module's path when there is no rule for it.
    """
    module = copy.deepcopy(module).eval()
    try:
        traced = torch.fx.symbolic_trace(module)
    except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{type(module).__name__}: cannot be traced ({error}); allowed: a forward without branches on values"
        ) from error
    graph = Graph(tuple(_Reader(traced).read()))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return lay_out(graph, shapes, example[:1].shape)


@torch.no_grad()
def lay_out(graph: Graph, parameters: Mapping[str, Sequence[int]], example: Sequence[int]) -> Trace:
    """Apply every operation's rule, in order.

    parameters: the shape of each tensor of the state dict. example: the shape of one image, (1, ...).
    """
    # One zero seen as every parameter: real kernels say each value's shape, and nothing is allocated for weights.
    # (Tensors on the meta device would do too, but their first use imports a second's worth of compiler.)
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in parameters.items()}
    groups, last = Groups(), graph.last_uses()
    first = graph.nodes[0].name
    images = groups.new(example[1], "input")
    values = {first: torch.zeros(tuple(example))}
    shapes = {first: values[first].shape}
    layouts = {first: Layout(1, (Segment(images, example[1]),))}
    for node in graph.nodes[1:]:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = out = _try_node(node, inputs, state)
        shapes[node.name] = out.shape
        rule = OPERATIONS[node.operation].rule
        read = [layouts[name] for name in node.inputs]
        layouts[node.name] = rule(groups, node, read, [value.shape for value in inputs], out.shape)
        for name in last[node.name]:
            del values[name]
    fixed = {groups.find(s.group) for end in (first, graph.output.name) for s in layouts[end].segments}
    return Trace(
        graph,
        _collect(groups, fixed),
        {name: _named(groups, layout) for name, layout in layouts.items()},
        shapes,
        {name: tuple(shape) for name, shape in parameters.items()},
    )


def _try_node(node: Node, inputs: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
    try:
        return run_node(node, inputs, node_parameters(node, state))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise InputError(
            f"{node.name}: {node.operation} cannot run on {shapes} ({str(error).splitlines()[0]}); "
            "allowed: an example of the shape that the network takes"
        ) from error


def _collect(groups: Groups, fixed: set[str]) -> PermutationSpec:
    spans: dict[str, list[Any]] = {name: [] for name in groups.parents if groups.find(name) == name}
    for name, own in groups.spans.items():
        spans[groups.find(name)] += own
    return PermutationSpec(
        {n: PermutationGroup(n, groups.sizes[n], tuple(own), n in fixed) for n, own in spans.items()}
    )


def _named(groups: Groups, layout: Layout) -> Layout:
    return Layout(layout.dim, tuple(Segment(groups.find(s.group), s.size, s.block) for s in layout.segments))


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


def verify(module: nn.Module, traced: Trace, example: Tensor, tolerance: float = 1e-8) -> None:
    """Gate: the graph computes what the module does, and each group permuted at random leaves the outputs alone.

    Runs in float64 on perturbed weights, so that a branch that is switched off cannot hide an error.
    example: (n, ...). Raises InputError naming the group that fails.
    """
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(module).cpu().double().eval()
    state = {name: _perturbed(name, tensor, generator) for name, tensor in module.state_dict().items()}
    x = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.func.functional_call(module, state, (x,), tie_weights=False)
        if not _close(run_graph(traced.graph, state, x), expected, tolerance):
            raise InputError(
                f"{type(module).__name__}: the traced graph does not compute what the module does"
            )
        orders = {n: _cycle(g.size, generator) for n, g in traced.spec.free.items()}
        if _close(run_graph(traced.graph, permute(state, traced.spec, orders), x), expected, tolerance):
            return
        for name, order in orders.items():
            found = run_graph(traced.graph, permute(state, traced.spec, {name: order}), x)
            if not _close(found, expected, tolerance):
                raise InputError(f"group {name}: permuting its units changes the output; its trace is wrong")
    raise InputError("permuting all groups together changes the output; the trace is wrong")


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation that leaves no unit in its place."""
    drawn = torch.randperm(size, generator=generator)
    order = torch.empty_like(drawn)
    order[drawn] = drawn.roll(1)
    return order


def _perturbed(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    scale = tensor.square().mean().sqrt() if tensor.numel() else torch.tensor(0.0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    moved = tensor + 0.1 * (scale + 0.1) * noise
    return moved.abs() + 0.1 if name.endswith("running_var") else moved


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))
