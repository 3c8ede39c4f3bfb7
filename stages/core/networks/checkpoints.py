"""Networks on disk. Reading never runs code from the file, and accepts only a file that fits exactly."""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors
from stages.core.settings.profiles import Architecture

_WRAPPERS = ("model", "state_dict", "model_ema")  # where training scripts keep the state dict, in this order
_COUNTER = (
    "num_batches_tracked"  # files from before PyTorch 0.4.1 lack it, and it does not affect the outputs
)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors, .pth or .pt file, on the CPU.

    A .pth or .pt file holds a state dict, alone or under `model`, `state_dict` or `model_ema`; the prefix
    `module.` of torch.nn.DataParallel and of weight averages is taken off.

    Raises InputError when the file is missing, damaged or not a state dict, or when reading would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _unprefixed(read_tensors(path)[0])
    if path.suffix not in (".pth", ".pt"):
        raise InputError(f"{path}: found the suffix {path.suffix!r}; allowed: .safetensors, .pth, .pt")
    return _unprefixed(_unwrapped(path, _load(path)))


def load_into(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copy ``state`` into ``module``; every tensor of either must be in the other, in the same shape.

    ``name`` says in an error which file it was. Raises InputError for missing keys, unexpected keys, other
    shapes, and NaN or infinite values.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(_COUNTER)]
    if missing:
        raise InputError(
            f"{name}: {_some(missing, 'missing key')}; allowed: a checkpoint of this architecture"
        )
    unexpected = [key for key in state if key not in own]
    if unexpected:
        raise InputError(
            f"{name}: {_some(unexpected, 'unexpected key')}; allowed: a checkpoint of this architecture"
        )
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise InputError(
                f"{name}: a checkpoint of another architecture: "
                f"{key} found {_shape(tensor)}; allowed: {_shape(own[key])}"
            )
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"{name}: NaN or infinite values in {_some(broken, 'tensor')}; allowed: finite numbers"
        )
    module.load_state_dict(state)


def load_network(architecture: Architecture, path: Path) -> nn.Module:
    """Build the network and load its checkpoint; in evaluation mode, on the CPU. Raises InputError."""
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are overwritten: leave the random state alone
        network = build(architecture.name, architecture.arguments)
    load_into(network, read_state(path), str(path))
    return network.eval()


def _load(path: Path) -> Any:
    try:
        # Training scripts (torchvision's among them) save their arguments beside the weights; a Namespace is only data.
        with warnings.catch_warnings(action="ignore"), safe_globals([argparse.Namespace]):
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{named[1]}, which could run code" if named else "pickled objects, which could run code"
        raise InputError(
            f"{path}: refused: it holds more than tensors ({what}); "
            "allowed: a file as torch.save(network.state_dict(), ...) writes it"
        ) from error
    # A damaged file raises nearly anything, by where the damage is.
    except Exception as error:
        raise InputError(
            f"{path}: damaged or not a checkpoint ({_first_sentence(error)}); allowed: a whole file"
        ) from error


def _unwrapped(path: Path, found: Any) -> dict[str, Tensor]:
    if isinstance(found, Mapping):
        found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        names = list(found)[:3] if isinstance(found, Mapping) else type(found).__name__
        raise InputError(
            f"{path}: not a state dict (found {names}); "
            f"allowed: tensors by name, alone or under {', '.join(_WRAPPERS)}"
        )
    return dict(found)


def _unprefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in state if name != "n_averaged"]  # the counter of torch.optim.swa_utils
    if not all(name.startswith("module.") for name in names):
        return state
    return {name.removeprefix("module."): state[name] for name in names}


def _some(names: list[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _first_sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
