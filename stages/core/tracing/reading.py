"""ATen calls -> nodes of the table of operations.

What depends on parameters and constants alone is folded (stages.core.tracing.folding); what moves entries about is made
one node (stages.core.tracing.rearranging); dropout, identities and aliases vanish. Nothing is guessed: a call that is
not told here is an error that names it, the module it is in and the user's line.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from stages.core.graph.nodes import Graph, Node
from stages.core.graph.operations import ADAPTIVE, CONVOLUTIONS, POOLS, TRANSPOSED, UNARY
from stages.core.runtime.errors import InputError
from stages.core.tracing.export import INPUT, export, opname, unwrap
from stages.core.tracing.folding import Folding, made_like
from stages.core.tracing.rearranging import Factors


@dataclass(frozen=True)
class Reading:
    """A network as a graph. folding: what of its state is computed from other tensors."""

    graph: Graph
    folding: Folding

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """A network's tensors, on its device: its state dict and what is folded."""
        return self.folding.state(unwrap(module))


def read(module: nn.Module, example: Tensor) -> Reading:
    """Read a module, which is left as it is.

    example: (n, ...), of which the shape counts. Raises InputError naming the operation, the module's path and the
    user's line when there is no rule for it.
    """
    module = unwrap(module)
    exported = export(module, example)
    folding = Folding(exported.graph, exported.tensors)
    return Reading(Graph(tuple(_Reader(module, exported.graph, folding).read())), folding)


SKIPPED = {
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "clone", "alias", "contiguous", "detach",
    "lift_fresh_copy", "lift_fresh", "_to_copy", "to", "type_as", "conj", "resolve_conj", "expand_as_",
    "native_dropout", "_assert_tensor_metadata",
}  # fmt: skip
RESHAPES = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "_reshape_alias",
    "view_copy",
    "view_as",
    "reshape_as",
}
PERMUTES = {"permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT"}
BINARY_CALLS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "true_divide": "divide",
    "subtract": "subtract",
    "multiply": "multiply", "divide": "divide", "maximum": "maximum", "minimum": "minimum",
}  # fmt: skip
NUMBERS = {"add": "shift", "subtract": "shift", "multiply": "scale", "divide": "divide_by"}
SPELLED = {
    "hardtanh_": "hardtanh",
    "log_sigmoid_forward": "log_sigmoid",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
}
INTERPOLATION = {
    "upsample_nearest1d": "nearest", "upsample_nearest2d": "nearest", "upsample_nearest3d": "nearest",
    "upsample_linear1d": "linear", "upsample_bilinear2d": "bilinear", "upsample_bicubic2d": "bicubic",
    "upsample_trilinear3d": "trilinear", "_upsample_nearest_exact2d": "nearest-exact",
}  # fmt: skip


class _Reader:
    """Reads one graph. ``names``: of the node that stands for a call; several values: calls that give a tuple."""

    def __init__(self, module: nn.Module, graph: torch.fx.Graph, folding: Folding) -> None:
        self.module, self.graph, self.folding = module, graph, folding
        self.nodes: list[Node] = []
        self.names: dict[torch.fx.Node, str] = {}
        self.taken: set[str] = set()
        self.factors: dict[torch.fx.Node, tuple[torch.fx.Node, Factors]] = {}
        self.same: dict[torch.fx.Node, torch.fx.Node] = {}  # passes on what another call gives
        self.known: set[torch.fx.Node] = set()
        self.skipped: set[torch.fx.Node] = set()
        self.parts: dict[tuple[torch.fx.Node, int], Callable[[torch.fx.Node], None]] = {}

    def read(self) -> list[Node]:
        for fx in self.graph.nodes:
            if fx.op == "placeholder":
                if fx.name in self.folding.tensors:
                    self.known.add(fx)
                elif not self.nodes:
                    integers = not fx.meta["val"].is_floating_point()
                    self._node(fx, "input", [], {"integers": True} if integers else {}, name=fx.name)
                else:
                    raise InputError(f"{fx.name}: a second input; allowed: networks of one input")
            elif fx.op == "get_attr":
                self.known.add(fx)
                self.folding.tensors[fx.name] = getattr(self.graph.owning_module, str(fx.target))
            elif fx.op == "output":
                return self._finished(fx)
            elif fx.op != "call_function":
                raise self._unknown(fx, str(fx.target))
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
        return _upto(self.nodes, self._value(flat[0]))

    # -- nodes --------------------------------------------------------------------------------------------------

    def _node(
        self,
        fx: torch.fx.Node,
        operation: str,
        inputs: Sequence[torch.fx.Node],
        attributes: Mapping[str, Any] | None = None,
        parameters: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        values = tuple(self._value(i) for i in inputs)
        name = name or self._name(fx, parameters or {})
        self.taken.add(name)
        self.nodes.append(Node(name, operation, values, dict(attributes or {}), dict(parameters or {})))
        self.names[fx] = name

    def _name(self, fx: torch.fx.Node, parameters: Mapping[str, str]) -> str:
        name = fx.name
        if "weight" in parameters and not parameters["weight"].startswith("folded."):
            name = parameters["weight"].rpartition(".")[0].replace(".", "_") or name
        while name in self.taken:
            name += "_again" if name != fx.name else "_"
        return name

    def _value(self, fx: torch.fx.Node) -> str:
        """The name of the node that gives a value, made now where it only moves entries."""
        fx = self._through(fx)
        if fx in self.names:
            return self.names[fx]
        if fx in self.known:
            raise self._unknown(fx, "a constant in the place of a value")
        if fx not in self.factors:
            raise self._unknown(fx, f"{opname(fx)} of several values")
        source, factors = self.factors[fx]
        if factors.plain():
            return self._value(source)
        self._node(fx, "rearrange", [source], factors.attributes())
        return self.names[fx]

    def _through(self, fx: torch.fx.Node) -> torch.fx.Node:
        while fx in self.same:
            fx = self.same[fx]
        return fx

    def _shape(self, fx: torch.fx.Node) -> list[int]:
        return list(fx.meta["val"].shape)

    # -- calls --------------------------------------------------------------------------------------------------

    def _read(self, fx: torch.fx.Node) -> None:
        name = opname(fx)
        given = self._arguments(fx)
        method = getattr(self, f"_{name.strip('_')}", None) if name not in ("node", "name", "value") else None
        if name in SKIPPED:
            if not fx.users:
                return
            self.same[fx] = fx.args[0]
        elif name in RESHAPES:
            self._rearrange(fx, None)
        elif name in PERMUTES:
            self._rearrange(fx, self._order(fx, name, given))
        elif name in BINARY_CALLS:
            self._binary(fx, BINARY_CALLS[name], given)
        elif name in CONVOLUTIONS or name in TRANSPOSED:
            self._convolve(fx, name, given)
        elif name in POOLS or name in ADAPTIVE:
            self._pool(fx, name, given)
        elif name in INTERPOLATION:
            self._interpolate(fx, INTERPOLATION[name], given)
        elif SPELLED.get(name, name) in UNARY:
            self._elementwise(fx, SPELLED.get(name, name), given)
        elif method is not None:
            method(fx, given)
        elif not fx.users or name.startswith(("sym_", "_assert")):
            return
        else:
            raise self._unknown(fx, name)

    def _arguments(self, fx: torch.fx.Node) -> dict[str, Any]:
        """All arguments of a call by name."""
        schema = getattr(fx.target, "_schema", None)
        if schema is None:
            return {str(i): a for i, a in enumerate(fx.args)}
        given = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
        given |= dict(zip((a.name for a in schema.arguments), fx.args, strict=False))
        return given | dict(fx.kwargs)

    def _is_value(self, argument: Any) -> bool:
        return isinstance(argument, torch.fx.Node) and self._through(argument) not in self.known

    def _parameter(self, argument: Any) -> str:
        return self.folding.want(self._through(argument))

    def _roles(self, fx: torch.fx.Node, given: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, str]:
        """Parameters among the arguments: {role: state name}."""
        found = {}
        for role, argument in roles.items():
            if given.get(argument) is not None:
                if self._is_value(given[argument]):
                    raise self._unknown(fx, f"{opname(fx)} whose {role} depends on the input")
                found[role] = self._parameter(given[argument])
        return found

    def _elementwise(self, fx: torch.fx.Node, name: str, given: Mapping[str, Any]) -> None:
        first, *rest = given
        defaults = {a.name: a.default_value for a in fx.target._schema.arguments if a.has_default_value()}
        settings = {k: given[k] for k in rest if given[k] is not None and given[k] != defaults.get(k)}
        if any(isinstance(v, torch.fx.Node) for v in settings.values()):
            raise self._unknown(fx, f"{name} whose settings depend on a value")
        self._node(fx, name, [given[first]], settings)

    def _binary(
        self, fx: torch.fx.Node, name: str, given: Mapping[str, Any], called: str | None = None
    ) -> None:
        """called: the name of the node, by default that of the call."""
        a, b = given["self"], given["other"]
        if given.get("rounding_mode") is not None:
            raise self._unknown(fx, f"{name} that rounds")
        alpha = given.get("alpha", 1)
        a, b = self._number(a), self._number(b)
        if isinstance(b, int | float) and self._is_value(a):
            value = b * alpha
            self._node(
                fx, NUMBERS[name], [a], {"value": -value if name == "subtract" else value}, name=called
            )
        elif isinstance(a, int | float) and self._is_value(b):
            if name in ("add", "multiply"):
                self._node(fx, NUMBERS[name], [b], {"value": a}, name=called)
            elif name == "subtract":
                self._node(fx, "subtract_from", [b], {"value": a}, name=called)
            else:
                raise self._unknown(fx, f"{name} of a number by a value")
        elif alpha != 1:
            raise self._unknown(fx, f"{name} with alpha={alpha}")
        elif self._is_value(a) and self._is_value(b):
            self._node(fx, name, [a, b], name=called)
        else:
            value, lone = (a, b) if self._is_value(a) else (b, a)
            if len(self._shape(lone)) > len(self._shape(value)):
                raise self._unknown(fx, f"{name} of a parameter that has more dimensions than the value")
            attributes = {"reverse": True} if value is b and name in ("subtract", "divide") else {}
            parameter, view = self._seen(lone)
            if view:
                attributes["view"] = view
            self._node(fx, f"{name}_parameter", [value], attributes, {"value": parameter}, called)

    def _seen(self, lone: torch.fx.Node) -> tuple[str, list[int]]:
        """A parameter of one dimension that is only viewed as (1, d, 1, 1) stays what it is in the state dict."""
        at = self._through(lone)
        while at.op == "call_function" and opname(at) in RESHAPES | SKIPPED and at.args[0] in self.known:
            at = at.args[0]
        own = self.folding.tensors.get(at.name)
        shape = self._shape(lone)
        if (
            isinstance(own, str)
            and at is not lone
            and len(self._shape(at)) == 1
            and sum(n > 1 for n in shape) == 1
        ):
            return own, [1 if n == 1 else -1 for n in shape]
        return self._parameter(lone), []

    def _number(self, argument: Any) -> Any:
        """A constant of no dimension as a number, unless it is a parameter or comes from one."""
        if not isinstance(argument, torch.fx.Node) or self._is_value(argument):
            return argument
        fx = self._through(argument)
        if self._shape(fx) or self._from_parameters(fx):
            return fx
        return self.folding.value(fx, self.module).item()

    def _from_parameters(self, fx: torch.fx.Node) -> bool:
        stack, seen = [fx], set()
        while stack:
            node = stack.pop()
            if isinstance(self.folding.tensors.get(node.name), str):
                return True
            seen.add(node)
            stack += [n for n in node.all_input_nodes if n not in seen and not made_like(node)]
        return False

    def _addcmul(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        """self + value * tensor1 * tensor2, as its parts."""
        product, name = [given["tensor1"], given["tensor2"]], self._name(fx, {})
        if not any(map(self._is_value, product)):
            raise self._unknown(fx, "addcmul of a value and the product of two parameters")
        self._binary(fx, "multiply", {"self": product[0], "other": product[1]}, f"{name}_product")
        if given["value"] != 1:
            scaled = Node(f"{name}_scaled", "scale", (self.names[fx],), {"value": given["value"]})
            self.nodes.append(scaled)
            self.taken.add(scaled.name)
            self.names[fx] = scaled.name
        self._binary(fx, "add", {"self": fx, "other": given["self"]}, name)

    def _rsub(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._binary(
            fx, "subtract", {"self": given["other"], "other": given["self"], "alpha": given.get("alpha", 1)}
        )

    def _pow(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        exponent = self._number(given.get("exponent"))
        if not isinstance(exponent, int | float) or not self._is_value(given["self"]):
            raise self._unknown(fx, "a power that depends on a value")
        self._node(fx, "power", [given["self"]], {"value": exponent})

    # -- linear maps --------------------------------------------------------------------------------------------

    def _linear(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        parameters = self._roles(fx, given, {"weight": "weight", "bias": "bias"})
        self._node(fx, "linear", [given["input"]], {}, parameters)

    def _addmm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        if (
            self._is_value(given["self"])
            or self._is_value(given["mat2"])
            or given["beta"] != 1
            or given["alpha"] != 1
        ):
            raise self._unknown(fx, "addmm of values")
        weight = self.folding.want(self._through(given["mat2"]), transposed=True)
        parameters = {"weight": weight, "bias": self._parameter(given["self"])}
        self._node(fx, "linear", [given["mat1"]], {}, parameters)

    def _matmul(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        a, b = given["self"], given.get("other", given.get("mat2"))
        if self._is_value(a) and self._is_value(b):
            self._node(fx, "matmul", [a, b])
        elif self._is_value(a) and len(self._shape(b)) == 2:
            weight = self.folding.want(self._through(b), transposed=True)
            self._node(fx, "linear", [a], {}, {"weight": weight})
        elif self._is_value(b) and len(self._shape(a)) == 2 and len(self._shape(b)) > 2:
            self._in_front(fx, self._parameter(a), b)
        else:
            raise self._unknown(fx, "a matrix product with a parameter in front or of many dimensions")

    _bmm = _mm = _matmul

    def _in_front(self, fx: torch.fx.Node, weight: str, value: torch.fx.Node) -> None:
        """A matrix in front of a value: a linear map over the dimension before the last."""
        shape, name = self._shape(value), self._name(fx, {})
        letters = list(range(len(shape)))
        swapped = [*letters[:-2], letters[-1], letters[-2]]
        turned = self._ordered(f"{name}_turned", self._value(value), shape, letters, swapped)
        self.nodes.append(Node(f"{name}_map", "linear", (turned,), {}, {"weight": weight}))
        self.taken.add(f"{name}_map")
        found = [*self._shape(fx)[:-2], self._shape(fx)[-1], self._shape(fx)[-2]]
        self.names[fx] = self._ordered(name, f"{name}_map", found, letters, swapped)

    def _einsum(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        """Of two values as one product of matrices: letters of both, one of each, one that is summed over."""
        tensors = list(given["tensors"])
        terms, _, out = given["equation"].replace(" ", "").partition("->")
        a, _, b = terms.partition(",")
        both = [c for c in a if c in b and c in out]
        summed = [c for c in a if c in b and c not in out]
        rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
        made = [*both, *rows, *columns]
        plain = all(len({*t}) == len(t) and t.isalpha() for t in (a, b, out)) and sorted(made) == sorted(out)
        single = len(summed) == len(rows) == len(columns) == 1
        if len(tensors) != 2 or not (plain and single and all(self._is_value(t) for t in tensors)):
            raise self._unknown(fx, f"einsum {given['equation']}")
        own, names = self._name(fx, {}), []
        wanted = ([*both, *rows, *summed], [*both, *summed, *columns], list(out))
        for i, (tensor, term) in enumerate(zip(tensors, (a, b), strict=True)):
            names.append(
                self._ordered(f"{own}_{i}", self._value(tensor), self._shape(tensor), term, wanted[i])
            )
        name = own if made == wanted[2] else f"{own}_product"
        self.nodes.append(Node(name, "matmul", tuple(names), {}, {}))
        self.taken.add(name)
        sizes = dict(zip(out, self._shape(fx), strict=True))
        self.names[fx] = self._ordered(own, name, [sizes[c] for c in made], made, wanted[2])

    def _ordered(
        self, name: str, value: str, shape: list[int], found: Sequence[str], wanted: Sequence[str]
    ) -> str:
        """A value whose dimensions are named ``found``, in the order ``wanted``."""
        if list(found) == list(wanted):
            return value
        factors = Factors.of(shape)
        factors.permute([list(found).index(c) for c in wanted])
        self.nodes.append(Node(name, "rearrange", (value,), factors.attributes(), {}))
        self.taken.add(name)
        return name

    def _convolve(self, fx: torch.fx.Node, name: str, given: Mapping[str, Any]) -> None:
        spatial = len(self._shape(given["input"])) - 2
        parameters = self._roles(fx, given, {"weight": "weight", "bias": "bias"})
        padding = given["padding"]
        attributes = {
            "stride": _each(given["stride"], spatial),
            "padding": padding if isinstance(padding, str) else _each(padding, spatial),
            "dilation": _each(given["dilation"], spatial),
        }
        if "output_padding" in given and any(_each(given["output_padding"], spatial)):
            attributes["output_padding"] = _each(given["output_padding"], spatial)
        if given["groups"] != 1:
            attributes["groups"] = given["groups"]
        self._node(fx, name, [given["input"]], attributes, parameters)

    def _convolution(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        kind = "conv_transpose" if given["transposed"] else "conv"
        own = {k: v for k, v in given.items() if k != "output_padding" or given["transposed"]}
        self._convolve(fx, f"{kind}{len(self._shape(given['input'])) - 2}d", own)

    def _embedding(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._node(fx, "embedding", [given["indices"]], {}, self._roles(fx, given, {"weight": "weight"}))

    # -- norms --------------------------------------------------------------------------------------------------

    def _batch_norm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        roles = {
            "weight": "weight",
            "bias": "bias",
            "running_mean": "running_mean",
            "running_var": "running_var",
        }
        self._any_batch_norm(fx, given, self._roles(fx, given, roles))

    _cudnn_batch_norm = _native_batch_norm = _native_batch_norm_legit_no_training = _batch_norm
    _native_batch_norm_legit = _batch_norm

    def _any_batch_norm(
        self, fx: torch.fx.Node, given: Mapping[str, Any], parameters: dict[str, str]
    ) -> None:
        if "running_mean" in parameters and given.get("training"):
            raise self._unknown(fx, "batch norm on the statistics of the batch")
        if "running_mean" in parameters and ("weight" in parameters) != ("bias" in parameters):
            raise self._unknown(fx, "batch norm with a weight or a bias alone")
        operation = "batch_norm" if "running_mean" in parameters else "batch_statistics"
        self._first(fx, operation, [given["input"]], {"eps": given["eps"]}, parameters)

    def _instance_norm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        parameters = self._roles(fx, given, {"weight": "weight", "bias": "bias"})
        if not given["use_input_stats"]:
            raise self._unknown(fx, "instance norm with running statistics")
        groups = self._shape(given["input"])[1]
        self._node(fx, "group_norm", [given["input"]], {"groups": groups, "eps": given["eps"]}, parameters)

    def _group_norm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        parameters = self._roles(fx, given, {"weight": "weight", "bias": "bias"})
        groups = given.get("num_groups", given.get("group"))
        self._first(fx, "group_norm", [given["input"]], {"groups": groups, "eps": given["eps"]}, parameters)

    _native_group_norm = _group_norm

    def _layer_norm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        parameters = self._roles(fx, given, {"weight": "weight", "bias": "bias"})
        rank = len(given["normalized_shape"])
        attributes = {"eps": given["eps"]} | ({"rank": rank} if rank > 1 else {})
        self._first(fx, "layer_norm", [given["input"]], attributes, parameters)

    _native_layer_norm = _layer_norm

    def _first(self, fx: torch.fx.Node, *node: Any) -> None:
        """A call that may give a tuple, of which the first is the value."""
        self._node(fx, *node)
        if isinstance(fx.meta["val"], tuple | list):
            self.parts[fx, 0] = lambda user: self.same.__setitem__(user, fx)

    def _glu(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        """The first half of a dimension times the sigmoid of the second."""
        source, name = self._value(given["self"]), self._name(fx, {})
        shape = self._shape(given["self"])
        dim = given["dim"] % len(shape)
        half = shape[dim] // 2
        for i, start in enumerate((0, half)):
            cut = {"dim": dim, "start": start, "stop": start + half, "step": 1}
            self.nodes.append(Node(f"{name}_{i}", "slice", (source,), cut))
        self.nodes.append(Node(f"{name}_gate", "sigmoid", (f"{name}_1",)))
        self.nodes.append(Node(name, "multiply", (f"{name}_0", f"{name}_gate")))
        self.taken |= {name, f"{name}_0", f"{name}_1", f"{name}_gate"}
        self.names[fx] = name

    def _local_response_norm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        settings = {key: given[key] for key in ("size", "alpha", "beta", "k")}
        self._node(fx, "local_response_norm", [given["x"]], settings)

    def _prelu(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._node(fx, "prelu", [given["self"]], {}, self._roles(fx, given, {"weight": "weight"}))

    # -- attention, reductions ----------------------------------------------------------------------------------

    def _scaled_dot_product_attention(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        attributes = {k: given[k] for k in ("is_causal", "scale") if given.get(k)}
        inputs, mask, parameters = [given["query"], given["key"], given["value"]], given.get("attn_mask"), {}
        if mask is not None and self._is_value(mask):
            inputs.append(mask)
        elif mask is not None:
            parameters["mask"] = self._parameter(mask)
        self._node(fx, "attention", inputs, attributes, parameters)

    def _softmax(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        rank = len(self._shape(fx))
        self._node(fx, "softmax", [given["self"]], {"dim": given["dim"] % rank - rank})

    def _log_softmax(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._node(fx, "log_softmax", [given["self"]], {"dim": given["dim"]})

    def _reduce(self, fx: torch.fx.Node, operation: str, given: Mapping[str, Any]) -> None:
        dims = given.get("dim")
        if dims is None or dims == []:
            raise self._unknown(fx, f"{operation} over everything")
        dims = list(dims) if isinstance(dims, tuple | list) else [dims]
        if any(self._shape(given["self"])[d] % INPUT == 0 for d in dims):
            raise self._unknown(fx, f"{operation} over the images")
        self._node(
            fx, operation, [given["self"]], {"dims": dims, "keepdim": bool(given.get("keepdim", False))}
        )

    def _mean(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._reduce(fx, "mean", given)

    def _sum(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._reduce(fx, "sum", given)

    def _amax(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._reduce(fx, "amax", given)

    def _amin(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._reduce(fx, "amin", given)

    def _max(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        if "other" in given:
            self._binary(fx, "maximum", given)
        elif "dim" in given:
            self._reduce(fx, "amax", given)
            self.parts[fx, 0] = lambda user: self.same.__setitem__(user, fx)
        else:
            raise self._unknown(fx, "max over everything")

    def _min(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        if "dim" not in given:
            raise self._unknown(fx, "min over everything")
        self._reduce(fx, "amin", given)
        self.parts[fx, 0] = lambda user: self.same.__setitem__(user, fx)

    def _linalg_vector_norm(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        """F.normalize: x / max(|x|, eps), as one operation."""
        dims, low = given.get("dim"), next(iter(fx.users), None)
        at = low.users if low is not None and opname(low) in ("clamp_min", "clamp") else {}
        wide = next(iter(at), None)
        quotient = (
            next(iter(wide.users), None)
            if wide is not None and opname(wide) in ("expand", "expand_as")
            else wide
        )
        fits = (
            given["ord"] == 2 and dims is not None and len(dims) == 1 and given["keepdim"]
            and len(fx.users) == 1 and len(at) == 1 and quotient is not None and opname(quotient) == "div"
            and self._through(quotient.args[0]) is self._through(given["self"])
        )  # fmt: skip
        if not fits:
            raise self._unknown(fx, "a length that is not F.normalize's")
        self._node(quotient, "normalize", [given["self"]], {"dim": dims[0], "eps": float(low.args[1])})
        self.skipped |= {low, wide, quotient}

    # -- what moves entries about -------------------------------------------------------------------------------

    def _rearrange(self, fx: torch.fx.Node, order: Sequence[int] | None) -> None:
        source = self._through(fx.args[0])
        shape = self._shape(fx)
        base, factors = self.factors.get(source, (source, Factors.of(self._shape(source))))
        for base, factors in ((base, factors.copy()), (source, Factors.of(self._shape(source)))):  # noqa: B020
            if order is not None:
                factors.permute(order)
            elif not factors.reshape(shape):
                continue
            self.factors[fx] = (base, factors)
            return
        raise self._unknown(fx, f"{opname(fx)} to {tuple(shape)}")

    def _order(self, fx: torch.fx.Node, name: str, given: Mapping[str, Any]) -> list[int]:
        rank = len(self._shape(fx))
        line = torch.empty(tuple(range(2, 2 + rank)), device="meta")
        args = [line, *fx.args[1:]]
        return [n - 2 for n in fx.target(*args, **fx.kwargs).shape]

    def _pixel_shuffle(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        n, c, h, w = self._shape(given["self"])
        r = given["upscale_factor"]
        self._steps(fx, [[n, c // r**2, r, r, h, w], (0, 1, 4, 2, 5, 3), [n, c // r**2, h * r, w * r]])

    def _pixel_unshuffle(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        n, c, h, w = self._shape(given["self"])
        r = given["downscale_factor"]
        self._steps(fx, [[n, c, h // r, r, w // r, r], (0, 1, 3, 5, 2, 4), [n, c * r**2, h // r, w // r]])

    def _channel_shuffle(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        n, c, *rest = self._shape(given["self"])
        g = given["groups"]
        every = tuple(range(3, 3 + len(rest)))
        self._steps(fx, [[n, g, c // g, *rest], (0, 2, 1, *every), [n, c, *rest]])

    _native_channel_shuffle = _channel_shuffle

    def _steps(self, fx: torch.fx.Node, steps: Sequence[list[int] | tuple[int, ...]]) -> None:
        source = self._through(fx.args[0])
        factors = Factors.of(self._shape(source))
        for step in steps:
            if isinstance(step, tuple):
                factors.permute(step)
            elif not factors.reshape(step):
                raise self._unknown(fx, opname(fx))
        self.factors[fx] = (source, factors)

    def _cat(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._concatenate(fx, list(given["tensors"]), given["dim"])

    _concat = _concatenate_ = _cat

    def _concatenate(self, fx: torch.fx.Node, tensors: list[torch.fx.Node], dim: int) -> None:
        """Values side by side; zeros beside them are padding; parameters (a class token) one node each."""
        rank = len(self._shape(fx))
        if self._shape(tensors[0])[dim] % INPUT == 0:
            raise self._unknown(fx, "images side by side")
        values = [i for i, t in enumerate(tensors) if self._is_value(t)]
        if len(values) == len(tensors):
            self._node(fx, "concatenate", tensors, {"dim": dim % rank})
            return
        first, last = values[0], values[-1]
        if last - first + 1 != len(values):
            raise self._unknown(fx, "a constant between values that are concatenated")
        lone = [*reversed(tensors[:first]), *tensors[last + 1 :]]
        inner = self._name(fx, {}) + "_values"
        if len(values) > 1:
            self._node(fx, "concatenate", [tensors[i] for i in values], {"dim": dim % rank}, name=inner)
        else:
            self.names[fx] = self._value(tensors[first])
        for i, part in enumerate(lone):
            attributes, parameters = self._beside(part, i < first, dim % rank, rank)
            name = self._name(fx, {}) if i == len(lone) - 1 else f"{self._name(fx, {})}_{i}"
            operation = "concatenate_parameter" if parameters else "pad"
            before = self.names[fx]
            self.nodes.append(Node(name, operation, (before,), attributes, parameters))
            self.taken.add(name)
            self.names[fx] = name

    def _beside(
        self, part: torch.fx.Node, ahead: bool, dim: int, rank: int
    ) -> tuple[dict[str, Any], dict[str, str]]:
        part = self._through(part)
        if not self._from_parameters(part):
            found = self.folding.value(part, self.module)
            if not bool(found.any()):
                pad = [0, 0] * (rank - dim)
                pad[-2 if ahead else -1] = self._shape(part)[dim]
                return {"pad": pad}, {}
        return {"dim": dim - rank, "first": ahead}, {"value": self._parameter(part)}

    def _stack(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        dim, tensors = given["dim"] % len(self._shape(fx)), given["tensors"]
        if not all(self._is_value(t) for t in tensors):
            raise self._unknown(fx, "a stack of constants and values")
        names = []
        for i, tensor in enumerate(tensors):
            shape = self._shape(tensor)
            factors = Factors.of(shape)
            factors.reshape([*shape[:dim], 1, *shape[dim:]])
            name = f"{self._name(fx, {})}_{i}"
            self.nodes.append(Node(name, "rearrange", (self._value(tensor),), factors.attributes()))
            names.append(name)
        name = self._name(fx, {})
        self.nodes.append(Node(name, "concatenate", tuple(names), {"dim": dim}))
        self.taken.update((name, *names))
        self.names[fx] = name

    def _slice(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        size = self._shape(given["self"])[given["dim"]]
        start, stop, _ = slice(given["start"], given["end"]).indices(size)
        self._cut(fx, given["self"], given["dim"], start, stop, given["step"])

    def _narrow(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        start = given["start"]
        self._cut(fx, given["self"], given["dim"], start, start + given["length"], 1)

    def _cut(
        self, fx: torch.fx.Node, source: torch.fx.Node, dim: int, start: int, stop: int, step: int
    ) -> None:
        shape = self._shape(source)
        dim %= len(shape)
        if (start, stop, step) == (0, shape[dim], 1):
            self.same[fx] = source
        elif shape[dim] % INPUT == 0:
            raise self._unknown(fx, "a part of the images")
        else:
            self._node(fx, "slice", [source], {"dim": dim, "start": start, "stop": stop, "step": step})

    def _select(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        shape = self._shape(given["self"])
        dim = given["dim"] % len(shape)
        if shape[dim] % INPUT == 0:
            raise self._unknown(fx, "one of the images")
        self._node(fx, "select", [given["self"]], {"dim": dim, "index": given["index"] % shape[dim]})

    def _split(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        source, dim = given["self"], given["dim"]
        size = self._shape(source)[dim]
        sizes = given.get("split_size", given.get("split_sizes"))
        if isinstance(sizes, int):
            sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
        start = 0
        for i, own in enumerate(sizes):
            self.parts[fx, i] = lambda user, s=start, n=own: self._cut(user, source, dim, s, s + n, 1)
            start += own

    _split_with_sizes = _split

    def _chunk(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        size = self._shape(given["self"])[given["dim"]]
        self._split(
            fx, {"self": given["self"], "dim": given["dim"], "split_size": math.ceil(size / given["chunks"])}
        )

    def _unbind(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        for i in range(len(fx.meta["val"])):
            self.parts[fx, i] = lambda user, i=i: self._select(
                user, {"self": given["self"], "dim": given["dim"], "index": i}
            )

    def _getitem(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        make = self.parts.get((fx.args[0], fx.args[1]))
        if make is None:
            if fx.users:
                raise self._unknown(fx, f"output {fx.args[1]} of {opname(fx.args[0])}")
            return
        make(fx)

    def _index(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        picked = [i for i, index in enumerate(given["indices"]) if index is not None]
        if len(picked) != 1 or self._is_value(given["indices"][picked[0]]) or picked[0] == 0:
            raise self._unknown(fx, "an index that is not one list of places")
        self._pick(
            fx,
            given["self"],
            picked[0],
            self.folding.value(self._through(given["indices"][picked[0]]), self.module),
        )

    def _index_select(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        if self._is_value(given["index"]):
            raise self._unknown(fx, "an index that depends on a value")
        index = self.folding.value(self._through(given["index"]), self.module)
        self._pick(fx, given["self"], given["dim"] % len(self._shape(fx)), index)

    def _pick(self, fx: torch.fx.Node, source: torch.fx.Node, dim: int, index: Tensor) -> None:
        if index.dim() != 1 or index.dtype == torch.bool or self._shape(source)[dim] % INPUT == 0:
            raise self._unknown(fx, "an index that is not one list of places")
        size = self._shape(source)[dim]
        self._node(fx, "pick", [source], {"dim": dim, "index": [int(i) % size for i in index]})

    def _pad(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        pad, mode, value = list(given["pad"]), given.get("mode", "constant"), given.get("value")
        if not any(pad):
            self.same[fx] = given["self"]
            return
        extra = {"mode": mode} if mode != "constant" else {}
        extra |= {"value": value} if value else {}
        self._node(fx, "pad", [given["self"]], {"pad": pad, **extra})

    def _constant_pad_nd(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._pad(fx, given)

    def _mode_pad(self, fx: torch.fx.Node, given: Mapping[str, Any], mode: str) -> None:
        self._pad(fx, {"self": given["self"], "pad": given["padding"], "mode": mode})

    def _reflection_pad2d(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._mode_pad(fx, given, "reflect")

    _reflection_pad1d = _reflection_pad3d = _reflection_pad2d

    def _replication_pad2d(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._mode_pad(fx, given, "replicate")

    _replication_pad1d = _replication_pad3d = _replication_pad2d

    def _roll(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        dims = list(given["dims"])
        if not dims or any(self._shape(fx)[d] % INPUT == 0 for d in dims):
            raise self._unknown(fx, "a roll of the images")
        self._node(fx, "roll", [given["self"]], {"shifts": list(given["shifts"]), "dims": dims})

    def _flip(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._node(fx, "flip", [given["self"]], {"dims": list(given["dims"])})

    def _expand(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        before, after = self._shape(given["self"]), self._shape(fx)
        ahead = len(after) - len(before)
        sizes = [n if i < ahead or before[i - ahead] != n else -1 for i, n in enumerate(after)]
        if all(n == -1 for n in sizes):
            self.same[fx] = given["self"]
        elif any(n != -1 and n % INPUT == 0 for n in sizes):
            raise self._unknown(fx, "a value repeated over images")
        else:
            self._node(fx, "expand", [given["self"]], {"sizes": sizes})

    _expand_as = _expand

    # -- pooling ------------------------------------------------------------------------------------------------

    def _pool(self, fx: torch.fx.Node, name: str, given: Mapping[str, Any]) -> None:
        first = next(iter(given))
        settings = {k: _plain(v) for k, v in given.items() if k != first}
        if name in ADAPTIVE:
            settings = {"output_size": settings["output_size"]}
        else:
            settings["stride"] = settings.get("stride") or settings["kernel_size"]
            settings = {k: v for k, v in settings.items() if v is not None}
        self._node(fx, name, [given[first]], settings)
        if isinstance(fx.meta["val"], tuple | list):
            self.parts[fx, 0] = lambda user: self.same.__setitem__(user, fx)

    def _max_pool2d_with_indices(self, fx: torch.fx.Node, given: Mapping[str, Any]) -> None:
        self._pool(fx, "max_pool2d", given)

    _max_pool3d_with_indices = _max_pool1d_with_indices = None

    def _interpolate(self, fx: torch.fx.Node, mode: str, given: Mapping[str, Any]) -> None:
        settings: dict[str, Any] = {"mode": mode}
        factors = given.get("scale_factors")
        if factors:
            settings["scale_factor"] = list(factors)
        else:
            settings["size"] = self._shape(fx)[2:]
        if given.get("align_corners"):
            settings["align_corners"] = True
        self._node(fx, "interpolate", [given.get("input", given.get("self"))], settings)

    # -- refusals -----------------------------------------------------------------------------------------------

    def _unknown(self, fx: torch.fx.Node, what: str) -> InputError:
        stack = list((fx.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        lines = [line.strip() for line in (fx.meta.get("stack_trace") or "").splitlines() if line.strip()]
        places = [i for i, line in enumerate(lines) if line.startswith("File ")]
        own = [i for i in places if "site-packages/torch/" not in lines[i]] or places
        where = ""
        if own:
            file, line = lines[own[-1]].split('"')[1], lines[own[-1]].split("line ")[1].split(",")[0]
            code = lines[own[-1] + 1] if own[-1] + 1 < len(lines) else ""
            where = f" at {file}:{line} ({code})"
        return InputError(
            f"{path or type(self.module).__name__}: no rule for {what}{where}; "
            "allowed: another way to write it, or a rule of your own (docs/adding.md)"
        )


def _each(value: Any, count: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * count if len(value) == 1 else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _upto(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output needs, which is made the last one."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if node.name in needed or node.operation == "input":
            needed.update(node.inputs)
            kept.append(node)
    kept.reverse()
    return sorted(kept, key=lambda node: node.name == output)
