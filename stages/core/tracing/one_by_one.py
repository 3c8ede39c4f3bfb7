"""While a forward is exported: images that it takes one by one are refused, layers of both directions written out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stages.core.runtime.errors import InputError
from stages.core.tracing.recurrent import both_ways

INPUT = 10007  # a prime, the number of images while a network is read
MOST_ALONE = 100  # that a forward may look at one by one


class OneByOne(TorchFunctionMode):
    """A loop over images would make a graph of ``INPUT`` networks: InputError says so at its start. Recurrent layers of
    both directions are written out; ``parameter.data`` is the parameter, which torch.export takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].shape[:1] == (INPUT,):
            one = _takes_one(func, args[1:], kwargs or {})
            self.taken += one
            unbound = func in (Tensor.unbind, torch.unbind) and _dim(args[1:], kwargs or {}) == 0
            if unbound or (one and self.taken > MOST_ALONE):
                raise InputError("no rule for one of the images after the other")
        if getattr(func, "__name__", "") == "_pack_padded_sequence":
            raise InputError("no rule for a packed sequence, whose length each text decides")
        if getattr(func, "__self__", None) is Tensor.data:
            return args[0].detach()
        known = both_ways(getattr(func, "__name__", ""), args) if not kwargs else None
        return func(*args, **(kwargs or {})) if known is None else known


def _dim(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("dim", args[0] if args else 0)


def _takes_one(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call takes one entry of the first dimension."""
    if func is Tensor.__getitem__:
        first = args[0][0] if isinstance(args[0], tuple) and args[0] else args[0]
        return type(first) is int
    return func in (Tensor.select, torch.select) and _dim(args, kwargs) == 0
