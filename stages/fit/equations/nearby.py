"""Solutions with many ridges from the factor of one: a Krylov space of the inverse.

With A = G + r0 I and B = r0 A^-1, whose eigenvalues are between 0 and 1, the solution with another ridge r is

    (G + r I)^-1 R = f(B) R,     f(b) = b / (r0 + (r - r0) b)

and Lanczos' method gives f(B) R from a few products with B, one for each dimension of the space that all ridges share
(Guettel, Rational Krylov approximation of matrix functions, 2013: all poles in one place). For the next ridges of a
grid of two a decade, five dimensions leave errors of some thousandths.
"""

import torch
from torch import Tensor

from stages.fit.equations.factor import Cholesky

DIMENSIONS = 5
REACH = 3.2  # times the ridge of the factor, or a part of it


def reaches(at: float, ridge: float) -> bool:
    """Whether a factor at one ridge will do for another."""
    return 1 / REACH < ridge / at < REACH


class Nearby:
    """Of one factor and one right side. factor: of G + r0 I, (d, d). right: R (d, n), in the factor's type."""

    def __init__(self, factor: Cholesky, ridge: float, right: Tensor) -> None:
        self.ridge = ridge
        d, n = right.shape
        self._length = right.norm(dim=0)
        self._basis = right.new_zeros(n, DIMENSIONS, d)  # orthonormal for each column
        T = right.new_zeros(n, DIMENSIONS, DIMENSIONS)
        new = (right / _not_zero(self._length)).T
        for j in range(DIMENSIONS):
            self._basis[:, j] = new
            seen = self._basis[:, : j + 1]
            new = factor.solve_(new.T.clone()).T.mul(ridge)
            for _ in range(2):  # once more for what the first has rounded
                along = seen @ new[:, :, None]
                new = new.sub_((along.mT @ seen)[:, 0])
                T[:, j, : j + 1] += along[:, :, 0]
            new /= _not_zero(new.norm(dim=1, keepdim=True))
        values, self._vectors = torch.linalg.eigh(T.double())  # which reads the lower half
        self._values = values.clamp(0, 1)

    def solution(self, ridge: float) -> Tensor:
        """(G + ridge I)^-1 R: (d, n)."""
        f = self._values / (self.ridge + (ridge - self.ridge) * self._values)
        first = self._vectors[:, 0]  # of each vector what it has of R's direction
        along = (self._vectors @ (f * first)[:, :, None])[:, :, 0].to(self._basis.dtype)
        along *= self._length[:, None]
        return (along[:, None] @ self._basis)[:, 0].T


def _not_zero(length: Tensor) -> Tensor:
    return length.clamp(min=torch.finfo(length.dtype).tiny)
