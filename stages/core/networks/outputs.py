"""Networks that return their logits in a dict, a tuple or an object, read as networks that return them alone."""

import copy
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
ROWS = 5  # images of the run that finds the logits: hardly as many as a recurrent layer has states
Step = tuple[Any, int]  # a node of autograd and which of its outputs

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
    chosen: list[Any] = []  # the output that is read, found once; copies have it in common

    def logits_alone(module: nn.Module, args: Any, out: Any) -> Tensor | None:
        if isinstance(out, Tensor):
            return None
        if not chosen:
            chosen.append(_chosen(module, args, out))
        return _tensors(out)[chosen[0]]

    made.register_forward_hook(logits_alone)
    return made


def _chosen(module: nn.Module, args: Any, out: Any) -> Any:
    """Which output holds the logits: what is named so, the only one, or what the others are steps to."""
    held, what = _tensors(out), f"{type(module).__name__}: returns a {type(out).__name__} of "
    if not held:
        raise InputError(f"{what}no tensor; allowed: one tensor of logits")
    names = [name for name in NAMES if name in held][:1] or [*held]
    if len(names) > 1:
        names = [name for name in _ends(module, args) if name in held]
    if len(names) == 1:
        _tell(f"{what}{len(held)}; its {names[0]} is read")
        return names[0]
    raise InputError(
        f"{what}{some(map(str, held))}; allowed: one tensor, one that the others are steps to, one named logits, "
        f"or a choice: network.register_forward_hook(lambda *call: call[-1][{next(iter(held))!r}])"
    )


def _ends(module: nn.Module, args: Any) -> list[Any]:
    """The outputs of a row for each image that no layer reads again, without what is a function of another of them."""
    network = copy.deepcopy(module).eval()
    for own in network.parameters():
        own.requires_grad_(own.is_floating_point() or own.is_complex())
    with torch.enable_grad():
        held = _tensors(network.forward(torch.cat([args[0]] * ROWS)[:ROWS]))
    rows = {name: x for name, x in held.items() if x.grad_fn and x.dim() > 1 and len(x) == ROWS}
    steps = {name: (x.grad_fn, x.output_nr) for name, x in rows.items()}
    read = [
        start for start in steps.values() if any(_path(end, start) == (True, True) for end in steps.values())
    ]
    ends = {name: at for name, at in steps.items() if at not in read}
    made = [at for at in ends.values() if any(_path(at, start)[0] for start in ends.values() if start != at)]
    return [name for name, at in ends.items() if at not in made]


def _path(end: Step, start: Step) -> tuple[bool, bool]:
    """Whether an output was made of another one, and whether parameters took part in between."""
    waiting, seen, met, learned = [end], {start}, False, False
    while waiting:
        at = waiting.pop()
        met |= at == start
        if at not in seen and at[0] is not None:
            seen.add(at)
            learned |= hasattr(at[0], "variable")
            waiting += at[0].next_functions
    return met, learned


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
def _tell(line: str) -> None:
    log.info(line)
