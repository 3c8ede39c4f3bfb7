"""The unlabelled images that networks are merged on."""

import torch

from stages.core.images.batches import normalise
from stages.core.images.load import load_images
from stages.core.settings.params import Params
from stages.core.settings.places import DATA
from stages.core.sweep.batches import NO_TASK, Batch, images_to_batches
from stages.core.units.moments import Origin


def load_calibration(
    params: Params, images: int, batch_size: int, device: torch.device, data: Origin = "own"
) -> list[Batch]:
    """Preprocessed calibration images without labels: at most ``images`` of every task, or as many of the proxy."""
    profile = params.active
    if data == "proxy":
        wanted, images = [profile.proxy], images * len(profile.tasks)
    else:
        wanted = [task.data for task in profile.tasks.values()]
    whole = []
    for own in wanted:
        found = load_images(own, "calibration", DATA, limit=images)
        whole.append(normalise(found.images.to(device), own.mean, own.std))
    batches = images_to_batches(whole, batch_size)
    return [Batch(batch.images, NO_TASK) for batch in batches] if data == "proxy" else batches
