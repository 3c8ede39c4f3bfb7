"""Ways to spend a budget that look at no benefit: the same fraction everywhere, or the last layers."""

from collections.abc import Mapping

from stages.allocate.model import CostModel


def uniform(model: CostModel, limit: int) -> dict[str, int]:
    """The same separate fraction of every group, rounded down: the largest that costs at most ``limit``."""
    levels = sorted(
        {(s, d) for d in model.sizes.values() for s in range(1, d + 1)}, key=lambda pair: pair[0] / pair[1]
    )
    low, high = 0, len(levels)  # the first ``low`` fractions are known to fit
    at = lambda n: {g: d * levels[n - 1][0] // levels[n - 1][1] if n else 0 for g, d in model.sizes.items()}  # noqa: E731
    while low < high:
        middle = (low + high + 1) // 2
        if model.cost(at(middle)) <= limit:
            low = middle
        else:
            high = middle - 1
    return at(low)


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
