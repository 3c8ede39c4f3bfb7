"""Encoded images as tensors: several threads, in order, with a progress bar."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.core.runtime.errors import InputError
from stages.core.runtime.progress import Bar

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES_AT_A_TIME = 64  # images per piece of work of a thread
PIXELS = 50_000_000  # of one image, where nothing else is said
THIN = 8  # times the shorter side: of longer images the ends are cut off before they are scaled


def edges(images: Tensor) -> Tensor:
    """Outlines: half the Sobel gradient's magnitude of the grey image, the same in every channel; uint8 as it came.

    Colours and areas are gone. The border pixels are repeated outside.
    """
    grey = images.float()
    if images.shape[1] == 3:  # luminance, ITU-R BT.601
        grey = (grey * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).round()
    rows = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    kernels = torch.stack([rows, rows.T]).unsqueeze(1)  # whole numbers: exact, so the same bytes everywhere
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    magnitude = gradient.square().sum(1, keepdim=True).sqrt().div(2).round().clamp(max=255)
    return magnitude.to(torch.uint8).expand(-1, images.shape[1], -1, -1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "rotated": lambda x: torch.rot90(x, 1, (2, 3)),
    "inverted": lambda x: 255 - x,
    "mirrored": lambda x: torch.rot90(x, 3, (2, 3)).flip(3),
    "edges": edges,
}
"""Maps of uint8 images (n, c, h, h), each a domain of its own; all but ``edges`` are bijections."""


@dataclass(frozen=True)
class Decoder:
    """``image``: a name -> the image, opened but not yet decoded; ``where`` names the file in an error.

    The shorter side is scaled to ``resize``, then the central ``size`` x ``size`` is cut out. An image of more than
    ``pixels`` is refused by its header; None: 50 million, or four times resize^2 where that is more.
    """

    where: str
    image: "Callable[[str], Image]"
    size: int
    resize: int
    channels: int
    view: str
    pixels: int | None = None

    def __call__(self, names: Sequence[str]) -> Tensor:
        """uint8 (n, channels, size, size). Raises InputError with the name of an image that cannot be read."""
        out = torch.empty(len(names), self.channels, self.size, self.size, dtype=torch.uint8)
        for row, name in enumerate(names):
            out[row] = self._one(name)
        return VIEWS[self.view](out)

    def chunks(self, names: Sequence[str], show: bool = True) -> Iterator[Tensor]:
        """The decoded images of ``names`` in order, at most ``IMAGES_AT_A_TIME`` at a time."""
        threads = min(16, os.cpu_count() or 1)
        starts = iter(range(0, len(names), IMAGES_AT_A_TIME))
        ahead: deque[Future[Tensor]] = deque()
        pool = ThreadPoolExecutor(threads)
        bar = Bar(total=len(names), desc=f"reading {self.where}", unit="image", shown=show)
        try:
            with bar:
                for start in starts:
                    ahead.append(pool.submit(self, names[start : start + IMAGES_AT_A_TIME]))
                    if len(ahead) < 2 * threads:  # bounds what waits in memory
                        continue
                    yield _counted(ahead.popleft(), bar)
                while ahead:
                    yield _counted(ahead.popleft(), bar)
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, name: str) -> Tensor:
        try:
            with self.image(name) as image:
                self._check_pixels(name, *image.size)
                # JPEG can decode at half, a quarter or an eighth; twice the size keeps the scaling below exact.
                image.draft(None, (2 * self.resize, 2 * self.resize))
                fitted = _fit(image, "L" if self.channels == 1 else "RGB", self.size, self.resize)
        except InputError:
            raise
        # A damaged image can raise nearly anything: each decoder of PIL has its own exceptions.
        except Exception as error:
            raise InputError(f"{self.where}: {name}: not a readable image ({error})") from error
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, -1).permute(2, 0, 1)

    def _check_pixels(self, name: str, width: int, height: int) -> None:
        most = self.pixels or max(PIXELS, 4 * self.resize**2)
        if width * height > most:
            raise InputError(
                f"{self.where}: {name}: found {width} x {height} pixels; allowed: {most} (data.limits.pixels)"
            )


class Stream:
    """Images that are decoded whenever they are asked for: what is used where an array would not fit.

    Behaves as the uint8 tensor (n, c, h, w) it stands for, as far as indices and slices along n go.
    """

    def __init__(self, decoder: Decoder, names: Sequence[str]) -> None:
        self.decoder, self.names = decoder, names
        self.shape = torch.Size([len(names), decoder.channels, decoder.size, decoder.size])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: slice | Tensor) -> Tensor:
        names = self.names[chosen] if isinstance(chosen, slice) else [self.names[i] for i in chosen.tolist()]
        return torch.cat(list(self.decoder.chunks(names, show=False)))


def ahead(images: "Tensor | Stream", batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each tensor of indices (indices, images); a stream decodes the next batch while this one is used."""
    if isinstance(images, Tensor):
        yield from ((chosen, images[chosen]) for chosen in batches)
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(images.__getitem__, batches[0]) if batches else None
        for index, chosen in enumerate(batches):
            found = following.result()
            if index + 1 < len(batches):
                following = pool.submit(images.__getitem__, batches[index + 1])
            yield chosen, found


def _counted(future: "Future[Tensor]", bar: Bar) -> Tensor:
    found = future.result()
    bar.update(len(found))
    return found


def _fit(image: "Image", mode: str, size: int, resize: int) -> "Image":
    """Scale the shorter side to ``resize`` (bilinear, with antialiasing) and cut out the centre, as ``mode``."""
    from PIL.Image import Resampling

    image = _eight_bits(_middle(image)).convert(mode)
    width, height = image.size
    if min(width, height) != resize:
        scale = resize / min(width, height)
        width, height = max(resize, round(width * scale)), max(resize, round(height * scale))
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _middle(image: "Image") -> "Image":
    """A long image without its ends, of which nothing is used: one pixel by 200,000 would be scaled to gigabytes."""
    excess = [max(0, side - THIN * min(image.size)) // 2 for side in image.size]
    (x, y), (width, height) = excess, image.size
    return image.crop((x, y, width - x, height - y)) if x or y else image


def _eight_bits(image: "Image") -> "Image":
    """A grey image of 16 bits by its upper eight, as PIL reads colours of 16 bits; others as they are."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
