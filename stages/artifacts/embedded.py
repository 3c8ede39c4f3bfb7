"""The embedded artifacts: made here, from what the installed packages hold, without a network connection."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.core.networks.architectures import build
from stages.core.runtime.device import generator
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_bytes, write_tensors
from stages.core.settings.profiles import Architecture, Data, Profile


def materialise(profile: Profile, seed: int, files: Mapping[str, Path]) -> None:
    """Write the artifacts named in ``files`` (key -> path): digits, photographs, and freshly initialised networks.

    The initial weights depend on ``seed`` and on the task's position; the bytes on nothing else.

    Raises InputError for a profile whose data is not embedded, and for a key the profile does not use.
    """
    sets = profile.data
    for name, own in sets.items():
        if own.kind not in WRITERS and not files.keys().isdisjoint(own.places):
            raise InputError(
                f"source: found 'embedded', but {name} uses the {own.kind} {own.key}, "
                "which is not embedded; allowed: s3, local"
            )
    data = {own.key: own for own in sets.values()}
    tasks = {task.checkpoint: (position, name) for position, (name, task) in enumerate(profile.tasks.items())}
    for key, path in files.items():
        if key in data:
            _check_sizes(profile, data[key])
            WRITERS[data[key].kind](path, data[key].size)
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


def write_photographs(path: Path, size: int, count: int = 1000) -> None:
    """Write squares cut from scikit-learn's two photographs as safetensors: images uint8 (count, 3, size, size).

    Half of each photograph, at places and of sides (from ``size`` to the whole height) drawn once and for all.
    """
    from sklearn.datasets import load_sample_images  # here: slow to import

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    draw = generator(size, count)
    crops = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        height, width = photograph.shape[1:]
        share, top, left = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
        side = round(size * (min(height, width) / size) ** share)
        top, left = int(top * (height - side + 1)), int(left * (width - side + 1))
        crop = photograph[None, :, top : top + side, left : left + side].double()
        crops.append(F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True))
    write_tensors(path, {"images": torch.cat(crops).round().clamp(0, 255).to(torch.uint8)})


def enlarge(images: Tensor, size: int) -> Tensor:
    """Scale (n, h, h) with values 0 to 16 to uint8 (n, size, size) with values 0 to 255, bilinearly."""
    # In float64, so that the rounding is the same everywhere.
    scaled = F.interpolate(
        images.double().unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False
    )
    return (scaled.squeeze(1) * (255 / 16)).round().clamp(0, 255).to(torch.uint8)


def write_initial(path: Path, architecture: Architecture, seed: int, position: int) -> None:
    """Write a freshly initialised network as safetensors where ``path`` says so, else as torch.save does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, position).initial_seed())
        state = build(architecture.name, architecture.arguments).state_dict()
    if Path(path).suffix == ".safetensors":
        write_tensors(path, state)
    else:
        content = io.BytesIO()  # torch.save(path) would store the name of the temporary file
        torch.save(dict(state), content)
        write_bytes(path, content.getvalue())


WRITERS = {"digits": write_digits, "photographs": write_photographs}


def _check_sizes(profile: Profile, data: Data) -> None:
    sizes = sorted({own.size for own in profile.data.values() if own.key == data.key})
    if len(sizes) > 1:
        raise InputError(f"{data.key}: found the sizes {sizes} in one profile; allowed: one size for one key")
