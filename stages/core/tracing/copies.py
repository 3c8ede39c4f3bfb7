"""A user's module as it is read: out of its wrappers, and a copy of it, so that the module is left as it is."""

import copy
import logging
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stages.core.runtime.errors import InputError
from stages.core.runtime.surroundings import STANDS_FOR

WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule", "AveragedModel")

log = logging.getLogger(__name__)


def unwrap(module: nn.Module) -> nn.Module:
    """What a wrapper of torch holds. Raises InputError where the wrapper does something of its own."""
    while type(module).__name__ in WRAPPERS:
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(
                f"{type(module).__name__}: a hook on the wrapper; allowed: hooks on the module that it wraps"
            )
        log.info("%s: read as the module it wraps", type(module).__name__)
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def copied(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without what it remembers of its last run (tables made from its weights).

    Results of operations among its attributes (a pruned weight, what a hook has recorded) are copied as values,
    which torch does not do. Raises InputError where something else cannot be copied.
    """
    known: dict[int, Any] = {}
    seen: set[int] = set()
    for part in module.modules():
        stack: list[Any] = [vars(part)]
        while stack:
            found = stack.pop()
            if id(found) in seen:
                continue
            seen.add(id(found))
            if isinstance(found, FakeTensor):  # what a hook has recorded of an export
                known[id(found)] = found
            elif isinstance(found, Tensor) and found.grad_fn is not None:
                known[id(found)] = found.detach().clone()
            elif isinstance(found, Mapping):
                stack += found.values()
            elif isinstance(found, list | tuple):
                stack += found
    try:
        found = copy.deepcopy(module, known).train().eval()
        stands_for = getattr(module, STANDS_FOR, lambda: None)()
        _close_over_copies(found, {**known, id(stands_for): found} if stands_for is not None else known)
        return found
    except Exception as error:  # locks, files, generators: whatever a user's module holds
        raise InputError(
            f"{type(module).__name__}: cannot be copied ({said_first(error)}); allowed: tensors and settings"
        ) from error


def _close_over_copies(module: nn.Module, known: Mapping[int, Any]) -> None:
    """Functions among hooks and attributes that close over a part (`self.seen[name] = out`) close over its copy.

    known: id of what was copied -> its copy; functions are not copied by themselves.
    """
    for part in module.modules():
        for place in (vars(part), part._forward_hooks, part._forward_pre_hooks):
            for name, own in place.items():
                if isinstance(own, FunctionType):
                    place[name] = _of_copies(own, known, set())


def _of_copies(value: Any, known: Mapping[int, Any], closed: set[int]) -> Any:
    """closed: ids of the functions that this one is found in."""
    if isinstance(value, MethodType):
        own = known.get(id(value.__self__))
        return value if own is None else MethodType(value.__func__, own)
    if not isinstance(value, FunctionType):
        return known.get(id(value), value)
    if id(value) in closed or not value.__closure__:
        return value
    held = [_held(cell) for cell in value.__closure__]
    copies = [[_of_copies(own, known, closed | {id(value)}) for own in cell] for cell in held]
    if all(a is b for x, y in zip(held, copies, strict=True) for a, b in zip(x, y, strict=True)):
        return value
    cells = tuple(CellType(*cell) for cell in copies)
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__ = value.__kwdefaults__
    return made


def _held(cell: CellType) -> list[Any]:
    """What a variable of a closure is; nothing where it is not set yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def said_first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
