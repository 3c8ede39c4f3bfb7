"""Changes to an image that leave what it is: the same for training a network and for refining a merged one."""

import torch
from torch import Tensor


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Move each image by up to ``shift`` pixels both ways, and mirror half of them if ``flip``.

    (n, c, h, w) -> (n, c, h, w). What comes in repeats the edge, so any background stays right.
    """
    n, _, h, w = images.shape
    device = images.device
    if shift == 0 and not flip:
        return images
    moves = torch.randint(-shift, shift + 1, (2, n, 1), generator=generator).to(device)
    rows = (torch.arange(h, device=device) + moves[0]).clamp(0, h - 1)  # (n, h)
    columns = (torch.arange(w, device=device) + moves[1]).clamp(0, w - 1)  # (n, w)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator).to(device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(n, device=device).view(n, 1, 1)
    return images.permute(0, 2, 3, 1)[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
