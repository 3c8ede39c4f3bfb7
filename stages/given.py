"""What a notebook gives, checked before anything is merged: networks, and what the images of each task come in."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.graph.inputs import of_shape
from stages.core.merged.network import MergedNetwork
from stages.core.merged.ranges import FLOATS
from stages.core.networks.outputs import with_logits_alone
from stages.core.runtime.cache import Storage
from stages.core.runtime.errors import InputError, shown, some
from stages.core.runtime.surroundings import users_code
from stages.core.sweep.batches import Batch
from stages.core.sweep.values import ImagesOnDisk
from stages.core.tracing.copies import copied, unwrap
from stages.loaders import kind_of, read_images

log = logging.getLogger(__name__)


def checked_networks(networks: Any) -> dict[str, nn.Module]:
    """Task name -> module. A merged network is taken in its plain form. Raises InputError."""
    if not isinstance(networks, Mapping):
        raise InputError(f"networks: found {kind_of(networks)}; allowed: a mapping of task names to modules")
    if len(networks) < 2:
        raise InputError(f"networks: found {len(networks)}; allowed: two or more")
    found = {}
    for name, network in networks.items():
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"networks: found a task named {shown(name)}; allowed: a text")
        found[name] = checked_network(network, f"task {name}")
    kinds = {name: _kind(network) for name, network in found.items()}
    if len(set(kinds.values())) > 1:
        raise InputError(
            f"networks: found {some(f'{n} of {k}' for n, k in kinds.items())}; allowed: one type of number, as after "
            "network.float()"
        )
    return found


@torch.no_grad()  # tensors that inference mode made take part in no other
def checked_network(network: Any, what: str) -> nn.Module:
    """A module of ordinary tensors, out of its wrappers, that returns its logits alone. Raises InputError."""
    if isinstance(network, MergedNetwork):
        log.info("%s: a merged network, taken in its plain form", what)
        network = network.plain()
    if not isinstance(network, nn.Module):
        more = ", with its weights loaded" if isinstance(network, Mapping) else ""
        raise InputError(f"{what}: found {kind_of(network)}; allowed: a torch.nn.Module{more}")
    packed = [name for name, held in network.state_dict().items() if not isinstance(held, Tensor)]
    if packed:
        raise InputError(
            f"{what}: {packed[0]} is no tensor; allowed: a network before it was quantised or packed"
        )
    tensors = [*network.named_parameters(), *network.named_buffers()]
    for name, tensor in tensors:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise InputError(f"{what}: {name} is lazy; allowed: a network that has seen images once")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.is_quantized:
            raise InputError(f"{what}: {name} is {_unusual(tensor)}; allowed: ordinary tensors")
        if tensor.is_floating_point() and str(tensor.dtype) not in FLOATS:
            raise InputError(f"{what}: {name} holds {tensor.dtype}; allowed: {some(sorted(FLOATS))}")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise InputError(f"{what}: {name} holds a negative variance; allowed: zero or more")
    if not any(True for _ in network.parameters()):
        raise InputError(f"{type(network).__name__}: has no parameters; allowed: a trained network")
    for kind, held in (("type of number", "dtype"), ("device", "device")):
        own = {str(getattr(p, held)) for p in network.parameters() if p.is_floating_point()}
        if len(own) > 1:
            raise InputError(f"{what}: parameters of {some(sorted(own))}; allowed: one {kind}")
    for name, tensor in network.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{what}: {name} holds NaN or infinite values; allowed: finite weights")
    return with_logits_alone(unwrap(network))


def _unusual(tensor: Tensor) -> str:
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantised"
    return "on the meta device, without numbers" if tensor.is_meta else f"of layout {tensor.layout}"


def _kind(network: nn.Module) -> str:
    return str(next((p.dtype for p in network.parameters() if p.is_floating_point()), None))


def checked_batches(
    networks: Mapping[str, nn.Module], batches: Any, images: int | None, storage: Storage = "memory"
) -> tuple[list[Batch], bool]:
    """The images of every task, on the device and of the type of the first network; whether networks made them floats.

    images: at most so many of each task are read. storage: disk: they are kept there, task after task.
    Raises InputError that says what was found and what is expected.
    """
    if not isinstance(batches, Mapping):
        raise InputError(f"batches: found {kind_of(batches)}; allowed: a mapping of the same tasks to images")
    if set(batches) != set(networks):
        raise InputError(
            f"batches: found tasks {some(sorted(map(str, batches)))}; allowed: those of networks, "
            f"{some(sorted(networks))}"
        )
    if images is not None and (type(images) is not int or images < 1):
        raise InputError(f"images: found {shown(images)}; allowed: a whole number from 1, or None for all")
    first = next(iter(networks.values()))
    weight = _numbers_of(first)
    found: list[Batch] = []
    counted = False
    for task, (name, network) in enumerate(networks.items()):
        runs = _runner(network, f"task {name}")
        images_of_task = read_images(batches[name], f"batches: task {name}", runs, images)
        floats = _as_floats(images_of_task, runs, name)
        counted |= floats[0].dtype != images_of_task[0].dtype
        own = [_numbers(batch, weight, name) for batch in floats]
        _warn_of_scale(own, name)
        _warn_of_one_answer(runs, own[0], name, type(network).__name__)
        if storage == "disk":
            kept = ImagesOnDisk()
            found += [Batch(kept, task, kept.add(batch)) for batch in own]
        else:
            found += [Batch(batch, task) for batch in own]
    return found, counted


def _as_floats(batches: Sequence[Tensor], runs: Callable[[Tensor], Tensor], name: str) -> list[Tensor]:
    """Images of whole numbers, which a network makes floats of, as those floats; others, and tokens, as they are.

    Raises InputError where the network makes something else of them.
    """
    first = batches[0]
    if first.is_floating_point() or first.is_complex() or first.dtype == torch.bool:
        return list(batches)
    wanted, floats = runs(first), first.float()
    try:
        found, between = runs(floats), runs(floats + 0.25)
    except InputError:  # floats are no tokens
        return list(batches)
    if torch.equal(found, between):  # nor are halves
        return list(batches)
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        raise InputError(
            f"batches: task {name}: found {first.dtype}, with which the network reckons otherwise than with floats; "
            "allowed: images.float()"
        )
    log.info("task %s: images of %s, taken as the floats that the network makes of them", name, first.dtype)
    return [batch.float() for batch in batches]


def _numbers_of(network: nn.Module) -> Tensor:
    """Some of the real numbers that a network has as parameters, or in complex ones."""
    every = list(network.parameters())
    return next((own for own in every if own.is_floating_point()), every[0]).real


def _numbers(batch: Tensor, weight: Tensor, name: str) -> Tensor:
    """On the network's device and, if they are floats, of its type."""
    plain = (batch.clone() if batch.is_inference() else batch.detach()).resolve_neg()
    moved = plain.to(weight.device, weight.dtype if plain.is_floating_point() else None)
    if moved.is_floating_point() and not bool(moved.isfinite().all()):
        raise InputError(f"batches: task {name}: found NaN or infinite images; allowed: finite numbers")
    return moved


def _runs(runner: nn.Module, x: Tensor, name: str) -> Tensor:
    """The logits of a few images, from a copy of the network in evaluation mode. Raises InputError."""
    weight = _numbers_of(runner)
    pair = two_of(x).to(weight.device, weight.dtype if x.is_floating_point() else None)
    what = f"{name}: {type(runner).__name__} on images of {of_shape(x.shape)}, {x.dtype},"
    with torch.no_grad(), users_code(what, "images of this task as the network takes them"):
        out = runner(pair)
    if not isinstance(out, Tensor):
        raise InputError(f"{what} returns {kind_of(out)}; allowed: one tensor of logits, (n, classes)")
    if out.dim() < 2 or len(out) != len(pair) or not out.numel():
        raise InputError(f"{what} returns {tuple(out.shape)} for 2 images; allowed: logits, (n, classes)")
    if not bool(out.isfinite().all()):
        raise InputError(f"{what} returns NaN or infinity; allowed: finite logits")
    return out


def two_of(images: Tensor) -> Tensor:
    """Two images, as a squeeze would take the batch away with one."""
    return torch.cat([images, images])[:2] if len(images) < 2 else images[:2]


def run_once(network: nn.Module, images: Tensor, name: str) -> Tensor:
    """A network's logits for the first images; it is left alone. Raises InputError."""
    return _runner(network, name)(images)


def _runner(network: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """What gives a network's logits for the first images, as ``_runs``."""
    return partial(_runs, copied(network), name=name)  # a copy: its parts can be in different modes


def _warn_of_scale(own: Sequence[Tensor], name: str) -> None:
    """Pixels from 0 to 255 where a network was hardly trained on them: said once a task."""
    least, most = min(float(x.min()) for x in own), max(float(x.max()) for x in own)
    if least >= 0 and 64 < most <= 255 and own[0].is_floating_point():
        log.warning(
            "task %s: its images run from %g to %g; the network is given them so: are they scaled as in training?",
            name,
            least,
            most,
        )


def _warn_of_one_answer(runs: Callable[[Tensor], Tensor], images: Tensor, name: str, kind: str) -> None:
    """Features or logits that are constant: said once a task. kind: of the network."""
    two, logits = two_of(images), runs(images)
    if not torch.equal(two[0], two[1]) and torch.equal(logits[0], logits[1]):
        log.warning(
            "task %s: %s gives different images the same logits: are its weights loaded, its images scaled?",
            name,
            kind,
        )


def checked_sizes(networks: Mapping[str, nn.Module], found: Sequence[Batch]) -> None:
    """Every network takes the images of every task, of every size they come in. Raises InputError."""
    shapes = {(images := batch.images).shape[1:]: images for batch in found}
    for name, network in networks.items():
        runs = _runner(network, f"task {name}")
        for images in shapes.values():
            runs(images)
