"""Training of one source network: SGD with Nesterov momentum over one cycle of the learning rate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.core.images.augment import augment
from stages.core.images.batches import normalise
from stages.core.images.decoding import ahead
from stages.core.images.load import ImageSet
from stages.core.runtime.errors import InputError
from stages.core.runtime.schedule import cycle, parameter_groups
from stages.core.settings.profiles import Data, Finetune

COLUMNS = ("epoch", "learning_rate", "train_loss", "train_accuracy")


def train(
    network: nn.Module,
    images: ImageSet,
    data: Data,
    settings: Finetune,
    generator: torch.Generator,
    device: torch.device,
    mixed_precision: bool = False,
    after_epoch: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train ``network`` in place on labelled images and leave it on ``device`` in evaluation mode.

    Weights decay, norm parameters and biases do not. The last batch of an epoch is left out where it is not
    full. ``mixed_precision`` computes in bfloat16 (weights stay float32). Loss and accuracy in the returned
    rows (keys ``COLUMNS``, one row an epoch) are means over the augmented batches in training mode.

    Raises InputError when the images or classes do not fit the network, and when the loss is not finite.
    """
    network.to(device, memory_format=torch.channels_last)
    _check(network, images, data, device)
    batch_size = min(settings.batch_size, len(images))
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(
        parameter_groups(network, settings.weight_decay),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )
    rows = []
    network.train()
    for epoch in range(settings.epochs):
        totals = torch.zeros(2, device=device)
        order = torch.randperm(len(images), generator=generator)
        for step, (chosen, x) in enumerate(
            ahead(images.images, order.split(batch_size)[:steps]), epoch * steps
        ):
            rate = settings.learning_rate * cycle(step, settings.epochs * steps, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = augment(x.to(device), settings.shift, settings.flip, generator)
            x = normalise(x, data.mean, data.std).contiguous(memory_format=torch.channels_last)
            y = images.labels[chosen].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                z = network(x)
            loss = F.cross_entropy(z.float(), y, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals += torch.stack([loss.detach(), (z.argmax(1) == y).float().mean()])
        rows.append(_row(epoch + 1, rate, totals / steps, settings))
        after_epoch()
    network.eval()
    return rows


def _row(epoch: int, rate: float, means: Tensor, settings: Finetune) -> dict[str, Any]:
    loss, accuracy = means.tolist()
    if not math.isfinite(loss):
        raise InputError(
            f"training diverged in epoch {epoch}: found a loss of {loss}; "
            f"allowed: a learning_rate below {settings.learning_rate:g}"
        )
    return dict(zip(COLUMNS, (epoch, *(f"{number:.6g}" for number in (rate, loss, accuracy))), strict=True))


def _check(network: nn.Module, images: ImageSet, data: Data, device: torch.device) -> None:
    first = normalise(images.images[:1].to(device), data.mean, data.std)
    try:
        with torch.no_grad():
            outputs = network.eval()(first).shape[1]
    except RuntimeError as error:
        shape = "x".join(map(str, first.shape[1:]))
        raise InputError(f"data: found images of {shape}, which the network cannot take ({error})") from error
    if outputs != len(images.classes):
        raise InputError(
            f"data: found {len(images.classes)} classes; allowed: {outputs}, the outputs of the network "
            "(data.classes and architecture.arguments.classes)"
        )
