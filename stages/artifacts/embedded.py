"""The embedded artifacts: made here, from what the installed packages hold, without a network connection."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.core.architectures import build
from stages.core.artifacts import write_bytes, write_tensors
from stages.core.device import generator
from stages.core.errors import InputError
from stages.core.params import Architecture, Data, Profile


def materialise(profile: Profile, seed: int, files: Mapping[str, Path]) -> None:
    """Write the artifacts named in ``files`` (key -> path): digits, and freshly initialised networks.

    The initial weights depend on ``seed`` and on the task's position; the bytes on nothing else.

    Raises InputError for a profile whose data is not embedded, and for a key the profile does not use.
    """
    for name, task in profile.tasks.items():
        if task.data.kind != "digits":
            raise InputError(
                f"source: found 'embedded', but task {name} uses the {task.data.kind} {task.data.key}, "
                "which is not embedded; allowed: s3, local"
            )
    data = {task.data.key: task.data for task in profile.tasks.values()}
    tasks = {task.checkpoint: (position, name) for position, (name, task) in enumerate(profile.tasks.items())}
    for key, path in files.items():
        if key in data:
            _check_sizes(profile, data[key])
            write_digits(path, data[key].size)
        elif key in tasks:
            position, name = tasks[key]
            write_initial(path, profile.architecture_of(name), seed, position)
        else:
            raise InputError(f"artifact key: found {key!r}; allowed: {', '.join([*data, *tasks])}")


def write_digits(path: Path, size: int) -> None:
    """Write scikit-learn's digits as safetensors: images uint8 (1797, size, size), labels int64 (1797,)."""
    from sklearn.datasets import load_digits  # here: slow to import

    found = load_digits()
    images = enlarge(torch.from_numpy(found.images), size)
    write_tensors(path, {"images": images, "labels": torch.from_numpy(found.target).long()})


def enlarge(images: Tensor, size: int) -> Tensor:
    """Scale (n, h, h) with values 0 to 16 to uint8 (n, size, size) with values 0 to 255, bilinearly."""
    # In float64, so that the rounding is the same everywhere.
    scaled = F.interpolate(
        images.double().unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False
    )
    return (scaled.squeeze(1) * (255 / 16)).round().clamp(0, 255).to(torch.uint8)


def write_initial(path: Path, architecture: Architecture, seed: int, position: int) -> None:
    """Write a freshly initialised network as .safetensors, .pth or .pt, by the suffix of ``path``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, position).initial_seed())
        state = build(architecture.name, architecture.arguments).state_dict()
    if Path(path).suffix == ".safetensors":
        write_tensors(path, state)
    elif Path(path).suffix in (".pth", ".pt"):
        content = io.BytesIO()  # torch.save(path) would store the name of the temporary file
        torch.save(dict(state), content)
        write_bytes(path, content.getvalue())
    else:
        raise InputError(f"{path}: found the suffix {Path(path).suffix!r}; allowed: .safetensors, .pth, .pt")


def _check_sizes(profile: Profile, data: Data) -> None:
    sizes = sorted({task.data.size for task in profile.tasks.values() if task.data.key == data.key})
    if len(sizes) > 1:
        raise InputError(f"{data.key}: found the sizes {sizes} in one profile; allowed: one size for one key")
