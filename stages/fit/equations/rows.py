"""Least squares on the rows themselves, for layers with more inputs than there are rows: the heads of a VGG, the last
layers of any network when few images are used.

The problem of stages.fit.equations.normal, solved in the space of the rows: with A the rows of z about their mean, each
times the square root of its weight, and R what the start leaves of y,

    W = W0 + (A^T (A A^T + ridge * mean(diag A^T A) I)^-1 R)^T
"""

import torch
from torch import Tensor

from stages.fit.equations.normal import Solution, check_finite, check_rows, solve_symmetric


class RowEquations:
    """At most ``count`` rows of z (rows, d_in) and y (rows, d_out), kept as they come."""

    def __init__(
        self, count: int, d_in: int, d_out: int, intercept: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.intercept, self.count = intercept, 0
        self.z = torch.empty(count, d_in, dtype=dtype, device=device)
        self.y = torch.empty(count, d_out, dtype=dtype, device=device)
        self.weights = torch.empty(count, dtype=torch.float64, device=device)

    @staticmethod
    def bytes(count: int, d_in: int, d_out: int, itemsize: int) -> int:
        """Memory of the rows."""
        return itemsize * count * (d_in + d_out)

    @staticmethod
    def solve_bytes(count: int, columns: int, rows: int) -> int:
        """Memory of solving a block: A with what it is made from, A A^T and its factor, what is like y and like W."""
        return 8 * (count * (2 * columns + 2 * count + 4 * rows) + 2 * columns * rows)

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """z (rows, d_in), y (rows, d_out)."""
        new = slice(self.count, self.count + len(z))
        self.z[new], self.y[new], self.weights[new] = z, y, weight
        self.count += len(z)

    def solve(self, rows: Tensor, columns: Tensor, start: Tensor, ridge: float, name: str = "") -> Solution:
        """One block: outputs ``rows`` from inputs ``columns``; start: W0, (rows, columns)."""
        check_rows(self.count, name)
        start, weights = start.double(), self.weights[: self.count]
        A, middle_z = self._centred(self.z, columns)
        target, middle_y = self._centred(self.y, rows)
        check_finite(A, target, name)
        penalty = ridge * float(torch.linalg.vector_norm(A).square()) / len(columns)
        W = solve_symmetric(A @ A.T, penalty, torch.addmm(target, A, start.T, alpha=-1), name).T @ A
        W += start
        given = A @ W.T
        energy, left = target.square().sum(0), (target - given).square().sum(0)
        if not self.intercept:
            return Solution(W, torch.zeros_like(energy), left, energy, None)
        mean = W @ middle_z
        moments = torch.stack([mean, given.square().sum(0) / weights.sum()])
        return Solution(W, middle_y - mean, left, energy, moments)

    def _centred(self, values: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Some entries of all rows about their mean, times the square root of the weight; the mean."""
        weights = self.weights[: self.count]
        own = values[: self.count, entries].double()
        middle = weights @ own / weights.sum() if self.intercept else own.new_zeros(len(entries))
        return own.sub_(middle).mul_(weights.sqrt()[:, None]), middle
