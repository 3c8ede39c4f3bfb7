"""Networks that return their logits in a dict, a tuple or an object, read as networks that return them alone."""

import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.runtime.errors import InputError, some
from stages.core.runtime.surroundings import STANDS_FOR

NAMES = ("logits", "out", "output", "pred", "preds", "prediction", "predictions", "scores")

log = logging.getLogger(__name__)


def with_logits_alone(network: nn.Module) -> nn.Module:
    """The same parts and tensors in a module of the same type, of which a hook takes the logits out.

    What returns a tensor is left as it is; the module itself keeps what it returns.
    """
    if isinstance(network, torch.jit.ScriptModule | torch.fx.GraphModule):
        return network
    made = network.__new__(type(network))
    made.__dict__ = {**vars(network), "_forward_hooks": OrderedDict(network._forward_hooks)}
    made.__dict__[STANDS_FOR] = weakref.ref(network)
    made.register_forward_hook(_logits_alone)
    return made


def _logits_alone(module: nn.Module, _: Any, out: Any) -> Tensor | None:
    if isinstance(out, Tensor):
        return None
    kind, held = type(out).__name__, _tensors(out)
    names = [name for name in NAMES if isinstance(held.get(name), Tensor)]
    if names or len(held) == 1:
        name = names[0] if names else next(iter(held))
        _tell(type(module).__name__, kind, str(name), len(held))
        return held[name]
    found = some(map(str, held)) if held else "no tensor"
    raise InputError(
        f"{type(module).__name__}: returns a {kind} of {found}; allowed: one tensor of logits, or several of which "
        "one is named logits"
    )


def _tensors(out: Any) -> dict[Any, Tensor]:
    """Those that an output holds, by name or by place."""
    if isinstance(out, Mapping):
        found = dict(out)
    elif hasattr(out, "_asdict"):
        found = out._asdict()
    elif isinstance(out, tuple | list):
        found = dict(enumerate(out))
    else:
        found = getattr(out, "__dict__", {})
    return {name: own for name, own in found.items() if isinstance(own, Tensor)}


@functools.cache
def _tell(network: str, kind: str, name: str, count: int) -> None:
    log.info("%s: returns a %s of %d; its %s is read", network, kind, count, name)
