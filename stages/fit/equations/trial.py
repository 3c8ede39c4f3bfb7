"""A block of a layer tried with several ridges: what they have in common is made once, and roughly where that will do.

A ridge is judged, not a map: some of the outputs stand for all, and single precision is enough where the ridge is large
beside its rounding. What is chosen is then solved by stages.fit.equations.solve.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from stages.core.sweep.gram import blocks
from stages.fit.equations.factor import Cholesky, cholesky_, factorise_
from stages.fit.equations.nearby import DIMENSIONS, Nearby, reaches
from stages.fit.equations.normal import NormalSystem
from stages.fit.equations.solve import left_over

OUTPUTS = 32  # that stand for all
MANY = 512  # rows of a matrix from which on one factor for several ridges is worth its while
ROUGH = 0.1  # the most that single precision rounds the matrix by, relative to the ridge


def some(rows: Tensor) -> Tensor:
    """At most ``OUTPUTS`` of the rows (n,), evenly spaced."""
    return rows[:: max(1, -(-len(rows) // OUTPUTS))]


def trial_bytes(d: int, columns: int, rows: int) -> int:
    """Memory of a trial with a matrix (d, d): that, the factor of another, and what is like the start."""
    near = 4 * (2 * DIMENSIONS + 5) * d if d >= MANY else 0  # basis, and a product as large
    return 8 * (2 * d * d + 5 * min(OUTPUTS, rows) * columns) + near * min(OUTPUTS, rows)


class Trial(ABC):
    """What is learnt from some rows, judged by others.

    matrix: the symmetric one of those learnt from, (d, d) float64, which stays as it is. left: what the start leaves of
    the targets, on the matrix's side (d, outputs); lost. scale: the mean diagonal of G. single: the ridge from which on
    single precision will do.
    """

    def __init__(self, matrix: Tensor, left: Tensor, scale: float, eps: float) -> None:
        self._matrix, self._eps = matrix, eps
        self._many = len(matrix) >= MANY
        # (G / s + ridge I) D = R / s: all within single precision's reach but R
        self._scale = scale if scale > 0 else 1.0
        self._penalised = scale > 0  # else there are no inputs but zeros
        self._left = left.div_(self._scale)
        self._factor: Cholesky | None = None
        self._at, self._near = math.nan, None
        norm = float(torch.linalg.vector_norm(matrix)) / self._scale  # no eigenvalue is larger
        self.single = norm * torch.finfo(torch.float32).eps / ROUGH

    def losses(self, ridges: Sequence[float]) -> list[float]:
        """Energy left of the rows held out by what is learnt from the others, for each ridge."""
        return [self._left_over(own) for own in self._solutions(ridges)]

    @abstractmethod
    def _left_over(self, solved: Tensor) -> float:
        """The same by a solution (d, outputs) float64 of the matrix's system."""

    def _solutions(self, ridges: Sequence[float]) -> Iterator[Tensor]:
        if not self._penalised:
            yield from [self._exactly(0.0)] * len(ridges)
            return
        for ridge in ridges:
            if ridge <= self.single or not self._factorised(ridge, ridges):
                yield self._exactly(ridge)
                continue
            right, largest = self._right
            if ridge == self._at and (len(ridges) == 1 or not self._many):
                found = self._factor.solve_(right.clone())
            else:
                self._near = self._near or Nearby(self._factor, self._at, right)
                found = self._near.solution(ridge)
            yield found.double().mul_(largest)

    def _factorised(self, ridge: float, ridges: Sequence[float]) -> bool:
        """Whether there is a factor that does for a ridge: of the middle one of those asked for, if of several."""
        if self._factor is not None and (ridge == self._at or (self._many and reaches(self._at, ridge))):
            return True
        self._factor = self._near = None  # before another is made beside it
        middle = sorted(ridges)[len(ridges) // 2]
        at = middle if self._many and reaches(middle, ridge) else ridge
        lower, failed = cholesky_(self._rough(), at)
        if not failed:
            self._factor, self._at = Cholesky(lower), at
        return not failed

    def _exactly(self, ridge: float) -> Tensor:
        factor = factorise_(self._scaled(), ridge, self._scaled, eps=self._eps)
        return factor.solve_(self._left.clone())

    def _scaled(self) -> Tensor:
        return self._matrix / self._scale

    @cached_property
    def _right(self) -> tuple[Tensor, Tensor]:
        """What is left in single precision, relative to its largest number, and that number."""
        largest = self._left.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        return (self._left / largest).float(), largest

    def _rough(self) -> Tensor:
        """The matrix in single precision."""
        found = torch.empty_like(self._matrix, dtype=torch.float32)
        for block in blocks(len(found)):
            found[block] = self._matrix[block] / self._scale
        return found


class SumTrial(Trial):
    """Of sums, by systems of both parts' rows. start: W0 (outputs, columns) float64."""

    def __init__(self, learnt: NormalSystem, held: NormalSystem, start: Tensor) -> None:
        matrix = learnt.G if learnt.columns is None else learnt.matrix()
        left, scale = learnt.left_by(start, matrix), learnt.mean_diagonal(matrix)
        super().__init__(matrix, left, scale, learnt.eps)
        self._learnt, self._held, self._start = learnt, held, start

    def _left_over(self, solved: Tensor) -> float:
        W = self._learnt.moved(self._start, solved)
        if self._learnt.means is None:
            return left_over(self._held, W, None)
        mean_z, mean_y = self._learnt.means
        return left_over(self._held, W, mean_y - W @ mean_z)


class RowTrial(Trial):
    """Of the rows themselves, by their products.

    matrix: K (n, n) of the rows that are learnt from; across: K (m, n) of those held out with them. left, held_left:
    what the start leaves of their targets, (n, outputs) and (m, outputs); lost.
    """

    def __init__(self, matrix: Tensor, across: Tensor, left: Tensor, held_left: Tensor, scale: float) -> None:
        super().__init__(matrix, left, scale, 0.0)
        self._across, self._held_left = across, held_left

    def _left_over(self, solved: Tensor) -> float:
        return float(torch.addmm(self._held_left, self._across, solved, alpha=-1).square().sum())
