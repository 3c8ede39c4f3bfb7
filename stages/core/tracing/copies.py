"""A user's module as it is read: out of its wrappers, and a copy of it, so that the module is left as it is."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stages.core.runtime.errors import InputError

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
        return copy.deepcopy(module, known).train().eval()
    except Exception as error:  # locks, files, generators: whatever a user's module holds
        raise InputError(
            f"{type(module).__name__}: cannot be copied ({said_first(error)}); allowed: tensors and settings"
        ) from error


def said_first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
