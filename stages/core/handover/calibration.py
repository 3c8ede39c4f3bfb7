"""The unlabelled images that networks are merged on."""

from typing import Literal

import torch

from stages.core.images.batches import Pool
from stages.core.images.load import load_images
from stages.core.runtime import ranks
from stages.core.settings.params import Params
from stages.core.settings.places import DATA
from stages.core.sweep.batches import NO_TASK, Batch, images_to_batches
from stages.core.units.moments import Origin

LEAST_IMAGES = (
    5  # images of a task for each rank, so that it has some that are held out (stages.fit.equations.ridge)
)


def load_calibration(
    params: Params, images: int, batch_size: int, device: torch.device, data: Origin = "own"
) -> list[Batch]:
    """Preprocessed calibration images without labels: at most ``images`` of every task, or as many of the proxy.

    They are read as they are used; each rank has its share of every task.
    """
    profile = params.active
    if data == "proxy":
        wanted, images = [profile.proxy], images * len(profile.tasks)
    else:
        wanted = [task.data for task in profile.tasks.values()]
    found = [load_images(own, "calibration", DATA, limit=images).images for own in wanted]
    pools = [Pool({"calibration": own}, kind, device) for own, kind in zip(found, wanted, strict=True)]
    for own in found:
        ranks.check_share(len(own) // LEAST_IMAGES, f"calibration images of a task, {LEAST_IMAGES} each")
    batches = images_to_batches(pools, batch_size)
    return [batch.of_task(NO_TASK) for batch in batches] if data == "proxy" else batches


def load_pools(
    params: Params, images: int | Literal["all"], most: int, device: torch.device, data: Origin = "own"
) -> list[Pool]:
    """Images without labels, a pool for every task, or one of the proxy; at most ``most`` in each.

    images: at most so many calibration images of each task; all: every one of them, and behind them those that the
    sources were trained on.
    """
    profile = params.active
    wanted = [profile.proxy] if data == "proxy" else [task.data for task in profile.tasks.values()]
    limit = most if images == "all" else min(most, images * (len(profile.tasks) if data == "proxy" else 1))
    pools = []
    for own in wanted:
        parts = {"calibration": load_images(own, "calibration", DATA, limit=limit).images}
        left = most - len(parts["calibration"])
        if images == "all" and data == "own" and left > 0:
            parts["train"] = load_images(own, "train", DATA, limit=left).images
        pools.append(Pool(parts, own, device))
    return pools
