"""Several processes that do one stage together: each has its share of the images, sums are added up over all of them.

They are started by `torchrun`, on one machine or several, or by the stage itself where the parameter `ranks` is above
1 (``spread``). A process on its own is rank 0 of 1, for which nothing here does anything. What is added up comes out
the same for all, and the same each time for as many ranks; another number of ranks adds in another order.
"""

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stages.core.runtime.errors import InputError

Said = TypeVar("Said")

_joined = False

GONE = "ranks: another rank is gone, its own line says why; run the same command again"


def join(device: torch.device) -> None:
    """Meet the others, where there are some: by gloo on CPUs, by NCCL on GPUs."""
    global _joined  # a process is of one group, as of torch's
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _together(lambda: dist.init_process_group("nccl" if device.type == "cuda" else "gloo"))
        _joined = True
        atexit.register(dist.destroy_process_group)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if _joined else 0


def on_this_machine() -> int:
    """How many of them share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def share(number: int) -> Tensor:
    """Which of so many this process has: int64, one stretch; shares differ by one at most."""
    return torch.arange(number).tensor_split(count())[rank()]


def check_share(number: int, what: str) -> None:
    """Gate: every rank has at least one."""
    if count() > 1 and number < count():
        raise InputError(f"ranks: found {count()} for {number} {what}; allowed: no more ranks than that")


def add_up(*tensors: Tensor) -> None:
    """Sum over all processes, in place."""
    if count() > 1:
        for own in tensors:
            _in_order(own, lambda x: dist.all_reduce(x))


def to_first(*tensors: Tensor) -> None:
    """The same, of use to rank 0 alone: what the others have then is lost."""
    if count() > 1:
        for own in tensors:
            _in_order(own, lambda x: dist.reduce(x, 0))


def from_first(*tensors: Tensor) -> None:
    """What rank 0 has, in place."""
    if count() > 1:
        for own in tensors:
            _in_order(own, lambda x: dist.broadcast(x, 0))


def said_by_first(value: Said) -> Said:
    """The same for anything small."""
    if count() == 1:
        return value
    found = [value]
    _together(lambda: dist.broadcast_object_list(found, 0))
    return found[0]


def said_by_all(value: Said) -> list[Said]:
    """What every process has, by rank."""
    found: list[Any] = [None] * count()
    if count() == 1:
        return [value]
    _together(lambda: dist.all_gather_object(found, value))
    return found


class _Sum(torch.autograd.Function):
    """Sum over all processes of which the gradients are summed in turn: for losses that are added up."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        x = x.clone()
        add_up(x)
        return x

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        add_up(gradient)
        return gradient


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, differentiable."""
    return x if count() == 1 else _Sum.apply(x)


def _in_order(tensor: Tensor, move: Callable[[Tensor], Any]) -> None:
    """Messages are read in the order of memory, which is not each tensor's."""
    own = tensor.detach()
    plain = own.contiguous()
    _together(lambda: move(plain))
    if plain.data_ptr() != own.data_ptr():
        own.copy_(plain)


def _together(move: Callable[[], Any]) -> None:
    """One line where another process does not answer. The message of the library names sockets alone."""
    try:
        move()
    except RuntimeError as error:
        raise InputError(GONE) from error
