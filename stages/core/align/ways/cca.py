"""CCA Merge (Horoi et al. 2024): every network in the coordinates of the first, by canonical correlations.

With S the covariances of two networks' units, S_aa and S_bb regularised, and U Sigma V^T the singular value
decomposition of S_aa^-1/2 S_ab S_bb^-1/2, the other network's units are seen through
T = S_aa^1/2 U V^T S_bb^-1/2, and read through its exact inverse.
"""

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.align.problem import Problem
from stages.core.recipe.methods import MatchSettings
from stages.core.recipe.rooms import ALIGNMENTS
from stages.core.units.moments import Moments


@ALIGNMENTS.register(uses=("ridge",))
def align_cca(problem: Problem, settings: MatchSettings) -> Alignment:
    """settings.ridge: added to every variance (the paper's gamma). With N > 2 all go to the first's coordinates."""
    return problem.each(lambda moments: _group(moments, settings.ridge))


def _group(moments: Moments, ridge: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    networks, k = len(moments.sizes), moments.sizes[0]
    covariance = moments.covariance
    first = moments.block(covariance, 0, 0)
    views, unmerges = [torch.eye(k, dtype=first.dtype)], [torch.eye(k, dtype=first.dtype)]
    for m in range(1, networks):
        T, inverse = cca_transform(
            first, moments.block(covariance, m, m), moments.block(covariance, 0, m), ridge
        )
        views.append(T)
        unmerges.append(inverse)
    return views, unmerges, torch.full((networks, k), 1 / networks, dtype=first.dtype)


def cca_transform(S_aa: Tensor, S_bb: Tensor, S_ab: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """T (k, k) that takes b's units to a's coordinates, and its inverse. All (k, k), float64."""
    half_a, inverse_a = _roots(S_aa, ridge)
    half_b, inverse_b = _roots(S_bb, ridge)
    # Of directions that never vary nothing is known: a trace of the identity leaves them with their pairs.
    U, _, Vt = torch.linalg.svd(inverse_a @ S_ab @ inverse_b + 1e-12 * torch.eye(len(S_ab), dtype=S_ab.dtype))
    return half_a @ U @ Vt @ inverse_b, half_b @ (U @ Vt).T @ inverse_a


def _roots(S: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(S + ridge I)^1/2 and its inverse."""
    values, vectors = torch.linalg.eigh((S + S.T) / 2)
    values = values.clamp(min=0) + ridge
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
