"""The seal of a merged file: a hash over its header and its tensors, so that a flipped bit is not taken as a weight.

It is a tensor of the file, as safetensors writes several entries of metadata in an order that changes from one time
to the next. It guards against accident: whoever can write the file can write its seal.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError

FORMAT = "merged-network-3"
SEAL = "sha256"  # name of the tensor, uint8 (32,)


def seal_of(header: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 over the header's text and, by name, every tensor but the seal: name, dtype, shape, bytes.

    Each of these comes behind its length, so that none can be read as a part of another. Returns uint8 (32,).
    """
    digest = hashlib.sha256()

    def add(part: bytes | memoryview) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(header.encode())
    for name in sorted(tensors.keys() - {SEAL}):
        tensor = tensors[name].detach().cpu().contiguous()
        for text in (name, str(tensor.dtype), str(tuple(tensor.shape))):
            add(text.encode())
        add(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def check_seal(header: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError when header and tensors are not those that were saved."""
    found = tensors.get(SEAL)
    if found is None:
        raise InputError(f"has no {SEAL}; allowed: a file as `save` wrote it")
    if not torch.equal(found, seal_of(header, tensors)):
        raise InputError(
            f"damaged: its {SEAL} is not that of its content; allowed: a file as `save` wrote it"
        )
