"""A block of a layer tried with several ridges: what they have in common is made once, and roughly where that will do.

A ridge is judged, not a map: some of the outputs stand for all, and single precision is enough where the ridge is large
beside its rounding. What is chosen is then solved by stages.fit.equations.solve.
"""

import torch
from torch import Tensor

from stages.fit.equations.factor import Cholesky, cholesky_, factorise_
from stages.fit.equations.solve import System, left_over

OUTPUTS = 64  # that stand for all
ROUGH = 0.01  # the most that single precision rounds the matrix by, relative to the ridge


def some(rows: Tensor) -> Tensor:
    """At most ``OUTPUTS`` of the rows (n,), evenly spaced."""
    return rows[:: max(1, -(-len(rows) // OUTPUTS))]


def trial_bytes(d: int, columns: int, rows: int) -> int:
    """Memory of a trial with a matrix (d, d): the matrix, the factor of another, and what is like the start."""
    return 8 * (2 * d * d + 5 * min(OUTPUTS, rows) * columns)


class Trial:
    """What is learnt from one system's rows, judged by those of another. start: W0 (rows, columns) float64."""

    def __init__(self, learnt: System, held: System, start: Tensor) -> None:
        self.learnt, self.held, self.start = learnt, held, start
        self.matrix = learnt.matrix()
        self.left = learnt.left_by(start, self.matrix)
        scale = learnt.mean_diagonal(self.matrix)
        self.penalised = scale > 0  # else there are no inputs but zeros
        if self.penalised:  # (G / s + ridge I) D = R / s: all of it within single precision's reach but R
            self.matrix /= scale
            self.left /= scale
        norm = float(torch.linalg.vector_norm(self.matrix))  # no eigenvalue is larger
        self.single = norm * torch.finfo(torch.float32).eps / ROUGH  # ridges from which it will do

    def loss(self, ridge: float) -> float:
        """Energy left of the rows held out by what is learnt from the others."""
        W = self.learnt.moved(self.start, self._solved(ridge if self.penalised else 0.0))
        if self.learnt.means is None:
            return left_over(self.held, W, None)
        mean_z, mean_y = self.learnt.means
        return left_over(self.held, W, mean_y - W @ mean_z)

    def _solved(self, ridge: float) -> Tensor:
        if ridge > self.single:
            lower, failed = cholesky_(self.matrix.float(), ridge)
            if not failed:
                largest = self.left.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
                return Cholesky(lower).solve_((self.left / largest).float()).double().mul_(largest)
        factor = factorise_(self.matrix.clone(), ridge, self.matrix.clone, self.learnt.name, self.learnt.eps)
        return factor.solve_(self.left.clone())
