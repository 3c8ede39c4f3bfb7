"""Factors of a symmetric matrix with a penalty on its diagonal, and solving with them: two steps kept apart."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cholesky:
    """lower: L (d, d), with L L^T the matrix."""

    lower: Tensor

    def solve_(self, right: Tensor) -> Tensor:
        """The solution for ``right`` (d, n), in its place."""
        half = torch.linalg.solve_triangular(self.lower, right, upper=False)
        return right.copy_(torch.linalg.solve_triangular(self.lower.mT, half, upper=True, out=half))


@dataclass(frozen=True)
class Spectrum:
    """inverse: (d,) of the eigenvalues, zero for those that are cut off; vectors (d, d)."""

    inverse: Tensor
    vectors: Tensor

    def solve_(self, right: Tensor) -> Tensor:
        """The smallest solution, so that what the data does not determine stays at the start."""
        return self.vectors @ (self.inverse[:, None] * (self.vectors.T @ right))


def factorise_(
    G: Tensor, penalty: float, again: Callable[[], Tensor], name: str = "", eps: float = 0.0
) -> Cholesky | Spectrum:
    """A factor of G + penalty I; G (d, d) is lost. By eigenvalues where Cholesky cannot work.

    again: makes G anew, should Cholesky fail. name: of the layer, for the log, once. eps: the relative rounding error
    in G, when that is larger than its type's.
    """
    if penalty > 0:
        lower, failed = cholesky_(G, penalty)
        if failed == 0:
            return Cholesky(lower)
        if name:
            _tell(name)
        G = again()
    values, vectors = torch.linalg.eigh(G)
    values = values + penalty
    kept = values > values.max().clamp(min=0) * len(G) * max(eps, torch.finfo(G.dtype).eps)
    return Spectrum(torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0), vectors)


@functools.cache
def _tell(name: str) -> None:
    log.info("%s: its inputs depend on each other; solved by eigenvalues, as Cholesky cannot", name)


def cholesky_(G: Tensor, penalty: float) -> tuple[Tensor, int]:
    """The lower factor in the place of G, and 0 or the pivot where Cholesky failed.

    LAPACK works column by column: the transpose of a symmetric matrix is that matrix in this order, so that the
    factor takes its place and no other is made.
    """
    G.diagonal().add_(penalty)
    info = torch.empty((), dtype=torch.int32, device=G.device)
    lower, info = torch.linalg.cholesky_ex(G.mT, out=(G.mT, info))
    return lower, int(info)
