"""Is a source network any good on its own images? Wrong preprocessing is the commonest silent mistake."""

import math

from torch import Tensor

DEVIATIONS = 2.0  # of what guessing the commonest class gives


def chance(labels: Tensor) -> float:
    """Percent right of always saying the commonest of ``labels`` (n,)."""
    return 100.0 * int(labels.bincount().max()) / len(labels)


def at_chance(accuracy: float, labels: Tensor) -> bool:
    """Whether ``accuracy`` (percent) on images with ``labels`` is no better than guessing would be by luck."""
    share = chance(labels) / 100
    return accuracy <= 100 * (share + DEVIATIONS * math.sqrt(share * (1 - share) / len(labels)))


def warning(task: str, accuracy: float, labels: Tensor) -> str:
    """One line: what was found, and what to look at."""
    return (
        f"task {task}: its source network is right on {accuracy:.1f} % of its own {len(labels)} test images, no better "
        f"than guessing ({chance(labels):.1f} %): check data.mean, std, size, resize, channels and the order of "
        "classes against its training"
    )
