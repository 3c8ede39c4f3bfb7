"""What a forward computes from its parameters and constants alone: tensors of their own, computed when it is read.

Position tables, masks, rotary angles, standardised or normalised weights: each that a value of the network is joined
with becomes one more tensor of the state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from stages.core.tracing.one_by_one import INPUT

PREFIX = "folded"


class Folding:
    """tensors: placeholder -> state name or constant.

    wanted: {state name: (the call that gives it, the order of its dimensions, its shape then)}, None where it stays.
    """

    def __init__(self, graph: torch.fx.Graph, tensors: Mapping[str, str | Tensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.wanted: dict[str, tuple[torch.fx.Node, list[int] | None, list[int] | None]] = {}
        self.alike: dict[torch.fx.Node, list[int]] = {}

    def want(
        self,
        fx: torch.fx.Node,
        transposed: bool = False,
        order: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> str:
        """The state name of what a call gives, ``transposed`` or with its dimensions in an order and then a shape."""
        while fx.name not in self.tensors and _passes_on(fx):
            fx = fx.args[0]
        own, ending = self.tensors.get(fx.name), "_t" if transposed else ""
        found = [] if order is None and not transposed else [_one_image(n) for n in self._shape(fx)]
        if transposed:
            order = [*range(len(found) - 2), len(found) - 1, len(found) - 2]
        elif order is not None:
            alike = list(order) == list(range(len(found))) and list(shape) == found
            order, ending = (None, "") if alike else (order, "_" + "".join(map(str, order)))
        counts = isinstance(own, str) and not fx.meta["val"].is_floating_point()
        if isinstance(own, str) and order is None and not counts:
            return own
        name = f"{PREFIX}.{fx.name}{ending}"
        self.wanted[name] = (fx, order and list(order), shape and list(shape))
        return name

    def _shape(self, fx: torch.fx.Node) -> Sequence[int]:
        known = self.tensors.get(fx.name)
        return known.shape if isinstance(known, Tensor) else fx.meta["val"].shape

    @torch.no_grad()
    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's state with what is computed from it."""
        own = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        like = next((t for t in own.values() if t.is_floating_point()), torch.zeros(()))
        known: dict[torch.fx.Node, Any] = {}
        for name, (fx, order, shape) in self.wanted.items():
            value = self._evaluate(fx, own, like, known)
            for dim in self._rows_alike(fx, own) if order is None else []:
                value = value.narrow(dim, 0, 1)
            value = value if order is None else value.permute(order)
            value = value if order is None or shape is None else value.reshape(shape)
            if not value.is_complex():  # whole numbers and masks too: what is averaged is no integer
                value = _finite(value.to(like))
            own[name] = value.contiguous().clone()
        return own

    def _rows_alike(self, fx: torch.fx.Node, own: Mapping[str, Tensor]) -> list[int]:
        """The dimensions of what lies beside images along which a call gives the same, whatever the parameters are: a
        first state of all sentences of all documents."""
        if fx not in self.alike:
            beside = [d for d, n in enumerate(self._shape(fx)) if n and n % INPUT == 0 and n > INPUT]
            if beside:
                generator = torch.Generator().manual_seed(0)
                drawn = {name: _drawn(tensor, generator) for name, tensor in own.items()}
                value = self._evaluate(fx, drawn, torch.zeros((), dtype=torch.float64), {})
                beside = [d for d in beside if value.allclose(value.narrow(d, 0, 1).expand_as(value))]
            self.alike[fx] = beside
        return self.alike[fx]

    def value(self, fx: torch.fx.Node, module: nn.Module) -> Any:
        """What one call gives."""
        own = dict(module.state_dict())
        return self._evaluate(fx, own, torch.zeros(()), {})

    def _evaluate(
        self, fx: torch.fx.Node, own: Mapping[str, Tensor], like: Tensor, known: dict[torch.fx.Node, Any]
    ) -> Any:
        stack = [fx]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            missing = (
                [n for n in node.all_input_nodes if n not in known] if node.name not in self.tensors else []
            )
            if missing and not _made_like(node):
                stack += missing
                continue
            known[node] = self._run(node, own, like, known)
            stack.pop()
        return known[fx]

    def _run(
        self, node: torch.fx.Node, own: Mapping[str, Tensor], like: Tensor, known: Mapping[torch.fx.Node, Any]
    ) -> Any:
        if node.name in self.tensors:
            found = self.tensors[node.name]
            found = own[found] if isinstance(found, str) else found
            return found.to(like) if found.is_floating_point() else found.to(like.device)
        if _made_like(node):  # of the input's type and device, not of its values
            return _filled(node, like)
        args = torch.fx.node.map_aggregate((node.args, node.kwargs), lambda a: _given(a, known))
        kwargs = dict(args[1])
        if "device" in kwargs:
            kwargs["device"] = like.device
        if kwargs.get("dtype") in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            kwargs["dtype"] = like.dtype
        found = node.target(*args[0], **kwargs)
        return found.to(like.dtype) if isinstance(found, Tensor) and found.is_floating_point() else found


LIKE = {
    "new_zeros": 0.0,
    "new_ones": 1.0,
    "zeros_like": 0.0,
    "ones_like": 1.0,
    "new_full": None,
    "full_like": None,
}


def _made_like(node: torch.fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2]
    return name in LIKE


def _filled(node: torch.fx.Node, like: Tensor) -> Tensor:
    name = node.target._schema.name.partition("::")[2]
    seen = node.meta["val"]
    fill = LIKE[name] if LIKE[name] is not None else node.args[-1]
    dtype = like.dtype if seen.dtype.is_floating_point else seen.dtype
    return torch.full([_one_image(n) for n in seen.shape], fill, dtype=dtype, device=like.device)


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in the place of a tensor's, as those of no training."""
    if not tensor.is_floating_point():
        return tensor.cpu()
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64)


def _finite(value: Tensor) -> Tensor:
    """With a very large number in the place of an infinite one (of masks), which can be averaged; NaN stays."""
    most = torch.finfo(value.dtype).max / 64
    return value.nan_to_num(nan=torch.nan, posinf=most, neginf=-most)


def _passes_on(node: torch.fx.Node) -> bool:
    """Whether a call gives, for one image, the tensor it is given."""
    name = node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else ""
    if name not in (
        "expand",
        "clone",
        "alias",
        "contiguous",
        "detach",
        "repeat",
        "dropout",
        "view",
        "reshape",
    ):
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return [_one_image(n) for n in before] == [_one_image(n) for n in after]


def made_like(node: torch.fx.Node) -> bool:
    """Whether a call makes a constant of another tensor's type."""
    return _made_like(node)


def _one_image(n: int) -> int:
    return n // INPUT if n and n % INPUT == 0 else n


def _given(argument: Any, known: Mapping[torch.fx.Node, Any]) -> Any:
    if isinstance(argument, torch.fx.Node):
        return known[argument]
    if isinstance(argument, int) and not isinstance(argument, bool):
        return _one_image(argument)
    return argument
