"""Units that are tied are one class; classes that may change places with each other have one colour."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stages.core.graph.axes import NONE, Units


def tied(units: Units) -> tuple[np.ndarray, np.ndarray]:
    """Class of each unit and, of each class, the class it is inside."""
    from scipy.sparse import coo_array  # here: slow to import
    from scipy.sparse.csgraph import connected_components

    def joined(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
        a = torch.cat([p[0] for p in pairs]).numpy() if pairs else np.zeros(0, dtype=int)
        b = torch.cat([p[1] for p in pairs]).numpy() if pairs else np.zeros(0, dtype=int)
        graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(units.count, units.count))
        return connected_components(graph, directed=False)[1]

    pairs = [(a, b) for a, b, _ in units.ties]
    inside = [(c, p) for c, p, _ in units.inside]
    while True:
        of = joined(pairs)
        parents, whole = _same_parents(inside, of), _too_deep(inside, of)
        if parents is not None:
            pairs.append(parents)
        elif whole is not None:
            pairs.append(inside.pop(whole))
        else:
            break
    outer = np.full(int(of.max()) + 1 if len(of) else 0, -1)
    for c, p in inside:
        outer[of[c.numpy()]] = of[p.numpy()]
    return of, outer


Inside = Sequence[tuple[Tensor, Tensor]]


def _same_parents(inside: Inside, of: np.ndarray) -> tuple[Tensor, Tensor] | None:
    """Units that are one class are inside one: pairs of parents to tie, if there are any."""
    if not inside:
        return None
    child, parent = (torch.cat(own) for own in zip(*inside, strict=True))
    own = torch.from_numpy(of)[child]
    order = own.argsort(stable=True)
    same = own[order][1:] == own[order][:-1]
    a, b = parent[order][1:][same], parent[order][:-1][same]
    new = torch.from_numpy(of)[a] != torch.from_numpy(of)[b]
    return (a[new], b[new]) if bool(new.any()) else None


def _too_deep(inside: Inside, of: np.ndarray) -> int | None:
    """A relation that makes no tree of two levels, whose units are then one with what holds them.

    Parts of parts (groups inside groups), or parts that cross others (a channel shuffle between grouped convolutions:
    every unit of either is in the same part as every other, and they stay whole together).
    """
    children = np.unique(np.concatenate([of[c.numpy()] for c, _ in inside])) if inside else np.zeros(0)
    for number, (_, parent) in enumerate(inside):
        own = np.unique(parent.numpy())
        parts = np.unique(of[own])
        if len(parts) < len(own) or np.isin(parts, children).any():
            return number
    return None


def colours_of(
    units: Units,
    of: np.ndarray,
    outer: np.ndarray,
    places: Mapping[tuple[str, int], np.ndarray],
    fixed: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A number for each class: equal for those that may change places; the same without what pins an order."""
    seen: list[list[tuple]] = [[] for _ in outer]
    for number, own in enumerate(places.values()):
        for cls, count in zip(*np.unique(own[own >= 0], return_counts=True), strict=True):
            seen[cls].append((number, int(count)))
    for number, own in enumerate(units.kernels.values()):
        for cls in np.unique(of[own.numpy()]):
            seen[cls].append((-1, number))
    for number, own in enumerate(units.pinned):
        for column, line in enumerate(own.T):
            for cls in np.unique(of[line[line != NONE].numpy()]):
                seen[cls].append((-2, number, column))
    for number, own in enumerate(
        units.beside
    ):  # units of one layer that were cut, and came here on several ways
        for way, labels in enumerate(own):
            for cls in np.unique(of[labels[labels != NONE].numpy()]):
                seen[cls].append((-3, number, way))
    keys: list[tuple] = [(bool(fixed[cls]), *own) for cls, own in enumerate(seen)]
    below: dict[int, list[tuple]] = {}
    for cls in np.flatnonzero(outer >= 0).tolist():
        below.setdefault(int(outer[cls]), []).append(keys[cls])
    whole = [(key, tuple(sorted(below.get(cls, ()), key=repr))) for cls, key in enumerate(keys)]
    numbers: dict[tuple, int] = {}
    result = np.zeros(len(outer), dtype=int)
    for cls in np.flatnonzero(outer < 0).tolist():
        result[cls] = numbers.setdefault(("top", whole[cls]), len(numbers))
    kinds = result.copy()
    for cls in np.flatnonzero(outer >= 0).tolist():
        result[cls] = numbers.setdefault((result[outer[cls]], keys[cls]), len(numbers))
        loose = tuple(key for key in keys[cls] if not (isinstance(key, tuple) and key[0] == -2))
        kinds[cls] = numbers.setdefault((result[outer[cls]], loose, "kind"), len(numbers))
    return result, kinds
