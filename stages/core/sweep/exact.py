"""Whether a network's batch norms have the exact statistics of some images already, so that no pass need find them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from stages.core.runtime import ranks
from stages.core.sweep.batches import Batch


def fingerprint(network: nn.Module, batches: Sequence[Batch], precision: torch.dtype | None = None) -> str:
    """SHA-256 of all tensors of a network, of the images with their tasks, and of the type that values are kept in.

    Statistics are a function of these alone: where it is what it was when a sweep had set them, a second sweep finds
    them again. It does not depend on how the images are cut into batches, nor do they but for rounding.
    """
    found = hashlib.sha256(str(precision or batches[0].images.dtype).encode())
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    seen = found if ranks.count() == 1 else hashlib.sha256()
    for batch in batches:
        for image in batch.images:
            seen.update(f"{batch.task} {image.dtype} {tuple(image.shape)}".encode())
            seen.update(_bytes(image))
    if seen is not found:
        found.update(" ".join(ranks.said_by_all(seen.hexdigest())).encode())
    return found.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
