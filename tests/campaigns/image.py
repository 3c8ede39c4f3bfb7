"""Images of a folder: every mode and format, sizes out of proportion, and damaged files.

Good: the data set is refused in one line, or every image has the size and the type that were asked for.
"""

import io
import random
import struct
import zipfile
from pathlib import Path

import torch
from PIL import Image

from stages.core.images.load import load_images
from stages.core.settings.profiles import Data
from tests.campaigns.rule import Bad, damaged, held

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "ICO", "EPS", "TGA")
MODES = ("L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I", "I;16", "F", "YCbCr")
SIDES = (1, 2, 7, 8, 9, 31, 64, 300)


def trial(draw: random.Random, folder: Path) -> str:
    """One case; what became of it."""
    channels, size = draw.choice([1, 3]), draw.choice([8, 16])
    with zipfile.ZipFile(folder / "case.zip", "w") as archive:
        for name in ("cat", "dog"):
            for part, count in (("train", 6), ("test", 2)):
                for number in range(count):
                    archive.writestr(f"{part}/{name}/{number}.png", sound())
        archive.writestr(f"train/cat/9{draw.choice(['.png', '.jpg', '.JPEG', '.bmp'])}", _strange(draw))
    data = Data(kind="folder", key="case.zip", size=size, channels=channels)
    outcome, found = held(lambda: load_images(data, draw.choice(["train", "train", "calibration"]), folder))
    if outcome == "read":
        images = (
            found.images[:] if isinstance(found.images, torch.Tensor) else torch.as_tensor(found.images[:])
        )
        if images.shape[1:] != (channels, size, size) or images.dtype != torch.uint8:
            raise Bad(f"gave {tuple(images.shape)}, {images.dtype}")
    return outcome


def sound() -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), 77).save(content, "PNG")
    return content.getvalue()


def _strange(draw: random.Random) -> bytes:
    if draw.random() < 0.1:
        return draw.choice(
            [b"", b"\x00", b"%!PS-Adobe", b"<svg/>", b"GIF89a", b"\x89PNG\r\n\x1a\n", draw.randbytes(200)]
        )
    size = draw.choice(SIDES), draw.choice(SIDES)
    if draw.random() < 0.1:
        size = draw.choice([(1, 200_000), (200_000, 1), (7000, 7000), (1, 60_000), (3, 20_000)])
    content = io.BytesIO()
    mode, kind = draw.choice(MODES), draw.choice(FORMATS)
    for fallback in (mode, "RGB", "L"):
        content = io.BytesIO()
        try:
            Image.new(fallback, size).save(content, kind)
        except (OSError, ValueError, KeyError, OverflowError, struct.error):
            continue
        break
    found = content.getvalue()
    return damaged(draw, found) if found and draw.random() < 0.6 else found
