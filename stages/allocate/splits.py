"""Splits of all groups for one budget: which units stay separate, and what that costs."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from stages.allocate.model import cost_model
from stages.allocate.solve import Allocation, allocate
from stages.core.graph.source import Source
from stages.core.merged.cost import split_cost
from stages.core.recipe.sections import AllocateSection
from stages.core.units.matching import UnitSplit


def split_units(
    source: Source,
    benefits: Mapping[str, Tensor],
    budget: float,
    networks: int,
    labels: str,
    settings: AllocateSection,
) -> tuple[dict[str, UnitSplit], Allocation, int]:
    """Splits of every free group, the allocation behind them, and the cost of one source.

    benefits {group: (d,)}: of separating each unit; a group's most beneficial units are separated first. Raises
    InputError when the budget is out of range.
    """
    dense, multiple = settings.dense, settings.multiple
    model = cost_model(source.trace, source.state, labels, settings.cost, networks, dense, multiple)
    gains = {name: benefit.numpy().astype(np.float64) for name, benefit in benefits.items()}
    found = allocate(model, gains, budget, networks, settings.levels, settings.nodes, settings.by, dense)
    splits = {}
    for name, count in found.separate.items():
        order = np.argsort(-gains[name], kind="stable").tolist()
        splits[name] = UnitSplit(tuple(sorted(order[count:])), tuple(sorted(order[:count])))
    shared = {name: len(split.shared) for name, split in splits.items()}
    counted = split_cost(source.trace, source.state, labels, settings.cost, shared, networks, dense)
    if counted != found.cost:
        raise AssertionError(f"allocation says {found.cost} {settings.cost}, the split has {counted}")
    return splits, found, model.base
