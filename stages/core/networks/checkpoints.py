"""Networks on disk. Reading never runs code from the file, and accepts only a file that fits exactly."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.networks.architectures import build
from stages.core.networks.torch_files import read_torch
from stages.core.runtime.errors import InputError, some
from stages.core.runtime.files import first_bytes, read_tensors
from stages.core.settings.profiles import Architecture

# Where training scripts keep the state dict, in this order.
_WRAPPERS = ("model", "net", "state_dict", "model_state_dict", "model_ema", "ema", "params", "weights")
# What wraps of DataParallel, torch.compile and a script's own classes put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
# Files from before PyTorch 0.4.1 lack it, and it does not affect the outputs.
COUNTER = "num_batches_tracked"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU. What a file is, is read from its bytes, not its suffix.

    A safetensors file, or one of torch.save with a state dict, alone or under one of ``_WRAPPERS``; what stands beside
    it (epochs, scores, optimisers) is left out.

    Raises InputError when the file is missing, damaged or not a state dict, when reading would run code, and for
    tensors that no layer holds.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{path}: found a folder; allowed: a checkpoint, as torch.save or safetensors write it"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    found = read_tensors(path)[0] if _is_safetensors(path) else read_torch(path)
    state = _weights(found)
    if state is None:
        names = some(found, 3) if isinstance(found, Mapping) else type(found).__name__
        raise InputError(
            f"{path}: not a state dict (found {names}); allowed: tensors by name, alone or under {', '.join(_WRAPPERS)}"
        )
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InputError(
                f"{path}: found a tensor by the name {name!r} ({type(name).__name__}); allowed: text"
            )
        if what := _unusual(tensor):
            raise InputError(f"{path}: {name}: found {what}; allowed: plain tensors of numbers")
    return {
        name: tensor.detach() for name, tensor in state.items() if name != "n_averaged"
    }  # of torch.optim.swa_utils


def load_into(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copy ``state`` into ``module``; every tensor of either must be in the other, in the same shape.

    Prefixes that all names have (``_PREFIXES``) are taken off where the names fit without. Numbers become those of the
    module: halves, floats and doubles of each other, whole numbers of whole numbers.

    ``name`` says in an error which file it was. Raises InputError for missing keys, unexpected keys, other
    shapes, other kinds of numbers, and values that are or become NaN or infinite.
    """
    own = module.state_dict()
    state = _fitted(state, own)
    missing = [key for key in own if key not in state and not key.endswith(COUNTER)]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise InputError(
            f"{name}: a checkpoint of another architecture: {len(missing)} missing and {len(unexpected)} unexpected "
            f"keys; the network has {some(missing or own, 2)}, the file {some(unexpected or state, 2)}"
        )
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise InputError(
                f"{name}: a checkpoint of another architecture: "
                f"{key} found {_shape(tensor)}; allowed: {_shape(own[key])}"
            )
    module.load_state_dict(
        {key: _cast(tensor, own[key].dtype, f"{name}: {key}") for key, tensor in state.items()}
    )


def load_network(architecture: Architecture, path: Path) -> nn.Module:
    """Build the network and load its checkpoint; in evaluation mode, on the CPU. Raises InputError."""
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are overwritten: leave the random state alone
        network = build(architecture.name, architecture.arguments)
    load_into(network, read_state(path), str(path))
    return network.eval()


def _is_safetensors(path: Path) -> bool:
    head = first_bytes(path, 9)
    return head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")))


def _weights(found: Any, depth: int = 3) -> dict[Any, Tensor] | None:
    """The tensors of the first wrapper that has some, else those of ``found`` itself; None where there are none."""
    if not isinstance(found, Mapping):
        return None
    for key in _WRAPPERS if depth else ():
        if inner := _weights(found.get(key), depth - 1):
            return inner
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)} or None


def _unusual(tensor: Tensor) -> str | None:
    """What makes a tensor none that a layer holds."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"a tensor without values (device {tensor.device})"
    if tensor.dtype not in (*_FLOATS, *_WHOLE, torch.bool):
        return str(tensor.dtype)
    return None


def _fitted(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` by the names without the prefixes that all of them have, as many as fit ``own`` best."""
    return max(unprefixed(state), key=lambda found: len(found.keys() & own.keys()))


def unprefixed(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The same tensors by their names, and by those without each prefix that all have (`module.`, `model.`, ...)."""
    yield state
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            yield from unprefixed({key.removeprefix(prefix): tensor for key, tensor in state.items()})


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` with the numbers of ``dtype``. Raises InputError for another kind, and where one cannot be held."""
    kinds = next((kinds for kinds in (_FLOATS, _WHOLE) if dtype in kinds), (dtype,))
    if tensor.dtype not in kinds:
        raise InputError(f"{name}: found {tensor.dtype}; allowed: {some(kinds, 5)}")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name}: NaN or infinite values; allowed: finite numbers")
    if name.endswith("running_var") and (tensor < 0).any():
        raise InputError(f"{name}: negative values; allowed: variances from 0")
    cast = tensor.to(dtype)
    if not (torch.isfinite(cast).all() if dtype in _FLOATS else torch.equal(cast.to(tensor.dtype), tensor)):
        raise InputError(f"{name}: values of {tensor.dtype} that {dtype} cannot hold; allowed: those it can")
    return cast


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
