"""ZipIt! (Stoica et al. 2024): clusters of correlated units, within and across networks, become one merged unit.

Greedily the best pair anywhere becomes one; its similarity to another is the smaller of the two, times alpha. Each
network may lose at most a share beta of its units to pairs within itself. It ends at the width of one network.
"""

import numpy as np
import torch
from torch import Tensor

from stages.core.align.alignment import Alignment, clustered
from stages.core.align.problem import Problem
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS
from stages.core.units.moments import Moments


@ALIGNMENTS.register(uses=("alpha", "beta"))
def align_zip(problem: Problem, settings: MatchSettings) -> Alignment:
    """settings.alpha: how much a merged unit is worth merging again. settings.beta: see the module's docstring."""
    return problem.each(lambda moments: _group(moments, settings.alpha, settings.beta))


def _group(
    moments: Moments, alpha: float, beta: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    k = moments.sizes[0]
    owner = np.repeat(np.arange(len(moments.sizes)), moments.sizes)
    similarity = moments.similarity("correlation").cpu().numpy()
    constant = (similarity == 0).all(
        1
    )  # what never changes is alike: nothing is lost where such units become one
    similarity[np.ix_(constant, constant)] = 1.0
    cluster = torch.from_numpy(zip_clusters(similarity, owner, k, alpha, beta))
    return clustered(cluster, moments.sizes)


def zip_clusters(
    similarity: np.ndarray, owner: np.ndarray, width: int, alpha: float, beta: float
) -> np.ndarray:
    """The cluster of each unit, int64 (n,), numbered by their first units: n - width merges.

    similarity (n, n); owner (n,): the network of each unit. A network that has used up its share has no two clusters
    merged any more that hold units of it apart, unless nothing else is left.
    """
    n = len(similarity)
    S = similarity.astype(np.float64, copy=True)  # of all pairs
    np.fill_diagonal(S, -np.inf)
    open_pairs = S.copy()  # of those that may be merged
    left = {m: int(beta * count) for m, count in enumerate(np.bincount(owner))}
    single = owner.copy()  # the network a cluster lies within, -1 where it spans several
    cluster, alive = np.arange(n), np.ones(n, dtype=bool)
    for m, allowed in left.items():
        if not allowed:
            open_pairs[np.ix_(single == m, single == m)] = -np.inf
    best = open_pairs.argmax(1)
    for _ in range(n - width):
        value = np.where(alive, open_pairs[np.arange(n), best], -np.inf)
        i = int(value.argmax())
        if value[i] == -np.inf:
            open_pairs = S.copy()
            best = open_pairs.argmax(1)
            i = int(np.where(alive, open_pairs[np.arange(n), best], -np.inf).argmax())
        i, j = sorted((i, int(best[i])))
        network = int(single[i]) if single[i] == single[j] else -1
        alive[j] = False
        cluster[cluster == cluster[j]] = cluster[i]
        single[i] = network
        for values in (S, open_pairs):
            values[i] = values[:, i] = alpha * np.minimum(values[i], values[j])
            values[i, i], values[j], values[:, j] = -np.inf, -np.inf, -np.inf
        if network >= 0:
            left[network] -= 1
            if not left[network]:
                own = alive & (single == network)
                open_pairs[np.ix_(own, own)] = -np.inf
                best = open_pairs.argmax(1)
                continue
        _renew(open_pairs, best, alive, i, j)
    return np.unique(cluster, return_inverse=True)[1]


def _renew(S: np.ndarray, best: np.ndarray, alive: np.ndarray, i: int, j: int) -> None:
    """The best partner of each cluster after j became part of i, without looking at all pairs again."""
    rows = np.arange(len(best))
    better = S[:, i] > S[rows, best]
    best[better] = i
    for row in np.flatnonzero(alive & ((best == i) | (best == j))):
        best[row] = S[row].argmax()
    best[i] = S[i].argmax()
