"""Functions and methods of a torch.fx graph as operations with their settings in one spelling."""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx

from stages.core.runtime.errors import InputError
from stages.core.tracing.shapes import Observed
from stages.core.tracing.vocabulary import (
    ALIAS,
    BINARY,
    CALLS,
    PERMUTES,
    RESHAPES,
    TORCHVISION_ALIASES,
    flatten_recipe,
)

Call = tuple[str, dict[str, Any], tuple[torch.fx.Node, ...]]  # operation, attributes, inputs


class Calls:
    """Reads one call at a time. lone: names of nodes that are parameters, unknown: makes the refusal of a node."""

    def __init__(
        self,
        observed: Observed,
        lone: Collection[str],
        unknown: Callable[[torch.fx.Node, str], InputError],
    ) -> None:
        self.observed, self.lone, self.unknown = observed, lone, unknown

    def read(self, fx: torch.fx.Node) -> Call:
        if fx.target in BINARY:
            return self._binary(fx)
        if fx.target in RESHAPES:
            return self._reshape(fx)
        if fx.target in PERMUTES:
            return self._permute(fx)
        if fx.target is operator.getitem:
            return self._select(fx)
        where = f"{getattr(fx.target, '__module__', '')}.{getattr(fx.target, '__name__', '')}"
        if where in TORCHVISION_ALIASES:
            return ALIAS, {}, fx.args[:1]
        if fx.target not in CALLS:
            raise self.unknown(fx, f"operation {getattr(fx.target, '__name__', fx.target)}")
        operation, names = CALLS[fx.target]
        args, kwargs = self._resolved(fx.args), self._resolved(fx.kwargs)
        given = dict(zip(names, args[1:], strict=False)) | dict(kwargs)
        given.pop("inplace", None)
        if given.get("return_indices") is False:
            del given["return_indices"]
        surplus = [*args[1 + len(names) :], *(given.keys() - names)]
        if surplus:
            raise self.unknown(fx, f"{operation} with {surplus[0]}")
        if any(isinstance(v, torch.fx.Node) and v.name not in self.lone for v in given.values()):
            raise self.unknown(fx, f"{operation} whose settings depend on a value")
        return self._settled(fx, operation, given, tuple(args[0]) if operation == "concatenate" else args[:1])

    def _settled(
        self, fx: torch.fx.Node, operation: str, given: dict[str, Any], inputs: tuple[torch.fx.Node, ...]
    ) -> Call:
        """Settings in one spelling."""
        if operation == "flatten":
            operation, given, _ = flatten_recipe(given.get("start_dim", 0), given.get("end_dim", -1))
        elif operation == "mean":
            dims = given.get("dim")
            given = {
                "dims": list(dims) if isinstance(dims, tuple | list) else [dims],
                "keepdim": bool(given.get("keepdim", False)),
            }
            if given["dims"] == [None]:
                raise self.unknown(fx, "mean over everything")
        elif operation == "concatenate":
            given.setdefault("dim", 0)
        elif operation == "layer_norm":
            if len(given.pop("normalized_shape")) > 1:
                raise self.unknown(fx, "layer norm over several dimensions")
            given.setdefault("eps", 1e-5)
        elif operation == "batch_norm":
            if given.pop("training", False) is not False:
                raise self.unknown(fx, "batch norm on the statistics of the batch")
            given.pop("momentum", None)
            given.setdefault("eps", 1e-5)
        elif operation == "conv2d":
            pairs = {"stride": 1, "padding": 0, "dilation": 1}
            groups = given.get("groups", 1)
            given = {role: given[role] for role in ("weight", "bias") if role in given} | {
                k: [v, v] if isinstance(v, int) else v if isinstance(v, str) else list(v)
                for k, v in ((k, given.get(k, default)) for k, default in pairs.items())
            }
            given |= {} if groups == 1 else {"groups": groups}
        elif operation == ALIAS:
            given = {}
        return operation, given, inputs

    def _binary(self, fx: torch.fx.Node) -> Call:
        joined, single = BINARY[fx.target]
        args = self._resolved(fx.args)
        values = tuple(arg for arg in args if isinstance(arg, torch.fx.Node))
        numbers = [arg for arg in args if isinstance(arg, int | float)]
        if len(args) != 2 or fx.kwargs or len(values) + len(numbers) != 2 or not values:
            raise self.unknown(fx, f"{joined} of {len(args)} arguments")
        if numbers:
            return single, {"value": numbers[0]}, values
        return joined, {}, values

    def _reshape(self, fx: torch.fx.Node) -> Call:
        """What joins neighbouring dimensions and keeps the batch is a flatten, whatever it is called."""
        before, after = self.observed.shape(fx.args[0]), self.observed.shape(fx)
        if before and after and before[0] == after[0]:
            if before == after:
                return ALIAS, {}, fx.args[:1]
            gone = len(before) - len(after)
            if after[1:] == (torch.Size(before[1:]).numel(),):
                return "flatten", {}, fx.args[:1]
            for start in range(len(before) - gone - 1, 0, -1):
                joined = torch.Size(before[start : start + gone + 1]).numel()
                if gone > 0 and (*before[:start], joined, *before[start + gone + 1 :]) == after:
                    return "flatten", {"start": start, "end": start + gone}, fx.args[:1]
        what = getattr(fx.target, "__name__", fx.target)
        raise self.unknown(fx, f"{what} to ({', '.join(map(str, fx.args[1:]))})")

    def _permute(self, fx: torch.fx.Node) -> Call:
        dims = self._resolved(fx.args[1:])
        if len(dims) == 1 and isinstance(dims[0], tuple | list):
            dims = tuple(dims[0])
        ndim = len(self.observed.shape(fx) or dims)
        if fx.kwargs or not all(isinstance(d, int) for d in dims):
            raise self.unknown(fx, f"{getattr(fx.target, '__name__', fx.target)} by keyword")
        order = [d % ndim for d in dims]
        if fx.target in ("transpose", torch.transpose):
            order, (a, b) = list(range(ndim)), order
            order[a], order[b] = b, a
        return "permute", {"dims": order}, fx.args[:1]

    def _select(self, fx: torch.fx.Node) -> Call:
        """x[:, 0] or x[:, 1:]: one index or range of one dimension."""
        index = self._resolved(fx.args[1])
        index = index if isinstance(index, tuple) else (index,)
        picked = [(dim, i) for dim, i in enumerate(index) if i != slice(None)]
        if len(picked) == 1:
            dim, i = picked[0]
            if isinstance(i, int) and not isinstance(i, bool):
                return "select", {"dim": dim, "index": i}, fx.args[:1]
            if isinstance(i, slice) and i.step is None and _whole(i.start) and _whole(i.stop):
                return "select", {"dim": dim, "range": [i.start, i.stop]}, fx.args[:1]
        raise self.unknown(fx, "operation getitem")

    def _resolved(self, args: Any) -> Any:
        """Arguments with numbers that do not depend on the batch in the place of the nodes that compute them."""
        return torch.fx.node.map_arg(args, self.observed.number)


def _whole(bound: Any) -> bool:
    return bound is None or isinstance(bound, int)
