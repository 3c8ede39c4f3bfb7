"""Neuron interpolation (arXiv 2507.00037): the units of all networks as k clusters, the merged units their centroids.

k-means over the units of every network at once, k the width of one, with each unit's values over the calibration images
(in front of the non-linearity, where the layers that write them end) standardised. Distances between units and means of
units follow from their correlations alone. The merge matrix is the cluster indicator, normalised; the unmerge matrix
the indicator.
"""

import numpy as np
import torch

from stages.core.align.alignment import Alignment, GroupAlignment, clustered
from stages.core.align.problem import Problem
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS
from stages.core.units.moments import Moments


@ALIGNMENTS.register(uses=("sweeps", "restarts"))
def align_kmeans(problem: Problem, settings: MatchSettings) -> Alignment:
    """settings.sweeps: at most so many iterations. settings.restarts: starts, of which the best is kept."""
    groups = {}
    for name, moments in problem.before.items():
        cluster = torch.from_numpy(_clusters(moments, settings))
        groups[name] = GroupAlignment(*clustered(cluster, moments.sizes), problem.correlations(name))
    return Alignment(problem.networks, groups)


def _clusters(moments: Moments, settings: MatchSettings) -> np.ndarray:
    alike = moments.similarity("correlation").cpu().numpy()  # what never changes is at the origin
    generator = np.random.default_rng(0)
    runs = [
        lloyd(alike, start(alike, moments.sizes[0], generator), settings.sweeps)
        for _ in range(settings.restarts)
    ]
    return min(runs, key=lambda run: run[1][-1])[0]


def start(products: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """The cluster of each point, int64 (n,): the nearest of k that are drawn by how far they are from those before.

    products: (n, n), inner products of the points; k-means++ of Arthur and Vassilvitskii 2007.
    """
    n, energy = len(products), products.diagonal()
    chosen, near, cluster = [], np.full(n, np.inf), np.zeros(n, dtype=np.int64)
    for number in range(k):
        left = np.ones(n) if number == 0 else np.where(near > 1e-9 * energy.max(), near, 0.0)
        if not left.any():
            left = np.isin(np.arange(n), chosen, invert=True).astype(np.float64)
        drawn = int(generator.choice(n, p=left / left.sum()))
        chosen.append(drawn)
        far = energy - 2 * products[drawn] + energy[drawn]
        far[drawn] = -np.inf  # nothing is nearer to it
        cluster[far < near] = number
        near = np.minimum(near, far)
    return cluster


def lloyd(products: np.ndarray, cluster: np.ndarray, sweeps: int) -> tuple[np.ndarray, list[float]]:
    """Clusters, none of them empty, and the sum of squared distances to their means after each iteration.

    products: (n, n), inner products of the points. cluster: int64 (n,), where every one of 0 to k - 1 has a point.
    Ends after ``sweeps`` iterations, or where one changes nothing.
    """
    k, every = int(cluster.max()) + 1, np.arange(len(products))
    far, losses = distances(products, cluster, k), list[float]()
    for _ in range(sweeps):
        losses.append(float(far[every, cluster].sum()))
        moved = far.argmin(1)
        own = far[every, moved]
        for empty in np.flatnonzero(np.bincount(moved, minlength=k) == 0):
            crowded = np.bincount(moved, minlength=k)[moved] > 1
            point = int(np.where(crowded, own, -np.inf).argmax())
            moved[point], own[point] = empty, 0.0
        again = distances(products, moved, k)
        if not again[every, moved].sum() < losses[-1]:
            break
        cluster, far = moved, again
    return cluster, losses


def distances(products: np.ndarray, cluster: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of every point to the mean of every cluster, (n, k)."""
    order = cluster.argsort(kind="stable")
    counts = np.bincount(cluster, minlength=k)
    starts = np.concatenate([[0], counts.cumsum()[:-1]])
    to_mean = np.add.reduceat(products[:, order], starts, axis=1) / counts  # (n, k)
    energy = np.add.reduceat(to_mean[order, cluster[order]], starts) / counts  # of the means
    return products.diagonal()[:, None] - 2 * to_mean + energy
