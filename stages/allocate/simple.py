"""Simple ways to spend a budget: the same fraction everywhere, the last layers, or one threshold of the benefit."""

from collections.abc import Callable, Mapping

import numpy as np

from stages.allocate.model import CostModel


def uniform(model: CostModel, limit: int) -> dict[str, int]:
    """The same separate fraction of every group, rounded down: the largest that costs at most ``limit``."""
    levels = sorted(
        {(s, d) for d in model.sizes.values() for s in range(1, d + 1)}, key=lambda pair: pair[0] / pair[1]
    )
    at = lambda n: {g: d * levels[n - 1][0] // levels[n - 1][1] if n else 0 for g, d in model.sizes.items()}  # noqa: E731
    return _dearest(model, limit, at, len(levels))


def prefix(model: CostModel, limit: int) -> dict[str, int]:
    """Merge the first groups, keep the last ones separate (partial zip of ZipIt!, Stoica et al. 2024, section 4.3).

    Groups are in the order of the forward pass; the one at the border is split so that the budget is used.
    """
    separate = dict.fromkeys(model.sizes, 0)
    for group in reversed(list(model.sizes)):
        cost = model.cost(separate)
        while separate[group] < model.sizes[group]:
            cost += model.step(separate, group)
            if cost > limit:
                return separate
            separate[group] += 1
    return separate


def threshold(model: CostModel, limit: int, benefits: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The units of all groups with a benefit above one number: the lowest with which they cost at most ``limit``.

    Equal benefits share a fate, so some of the budget may be left (Partial Fusion, arXiv 2605.22350).
    """
    steps = np.unique(np.concatenate([*benefits.values()]))[::-1]  # nothing is above the first
    at = lambda n: {g: int((own > steps[n]).sum()) for g, own in benefits.items()}  # noqa: E731
    return _dearest(model, limit, at, len(steps) - 1)


def _dearest(model: CostModel, limit: int, at: Callable[[int], dict[str, int]], last: int) -> dict[str, int]:
    """The last within ``limit`` of ``at(0)``, which is, to ``at(last)``, each dearer than the one before."""
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        if model.cost(at(middle)) <= limit:
            low = middle
        else:
            high = middle - 1
    return at(low)


def to_allowed(model: CostModel, separate: Mapping[str, int], limit: int) -> dict[str, int]:
    """Allowed numbers around given ones: all rounded down, then up where the budget has room, the nearest first."""
    found, above = {}, {}
    for g, s in separate.items():
        found[g] = max(level for level in model.allowed(g) if level <= s)
        above[g] = min(level for level in model.allowed(g) if level >= s)
    for g in sorted(above, key=lambda g: (above[g] - separate[g]) / model.sizes[g]):
        more = {**found, g: above[g]}
        found = more if model.cost(more) <= limit else found
    return found
