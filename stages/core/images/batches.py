"""Images as normalised batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.images.decoding import Stream, ahead
from stages.core.settings.profiles import Data


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std for uint8 (n, c, h, w) -> float32 (n, c, h, w); 1 or c numbers each."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).reshape(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).reshape(shape)
    return (images.float() / 255 - centre) / scale


@dataclass(frozen=True)
class Batches:
    """Normalised float32 batches (at most batch_size, c, h, w) of uint8 images, in order, on ``device``.

    Made anew at every pass, so no more than a batch is held in float32.
    """

    images: Tensor | Stream
    batch_size: int
    data: Data
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for _, batch in ahead(self.images, torch.arange(len(self.images)).split(self.batch_size)):
            yield normalise(batch.to(self.device), self.data.mean, self.data.std)


@dataclass(frozen=True)
class Pool:
    """Images of one kind without labels, normalised when they are asked for: ``pool[indices]`` -> (n, c, h, w).

    parts: uint8 images by the split they are of; indices count through them in order.
    """

    parts: Mapping[str, Tensor | Stream]
    data: Data
    device: torch.device

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """chosen: int64 (n,). Returns float32."""
        shape = next(iter(self.parts.values())).shape[1:]
        found, start = torch.empty(len(chosen), *shape, dtype=torch.uint8), 0
        for part in self.parts.values():
            inside = (chosen >= start) & (chosen < start + len(part))
            if inside.any():
                found[inside] = part[chosen[inside] - start]
            start += len(part)
        return normalise(found.to(self.device), self.data.mean, self.data.std)
