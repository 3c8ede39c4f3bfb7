"""Least squares on the rows themselves, for layers with more inputs than there are rows: the heads of a VGG, the last
layers of any network when few images are used.

The problem of stages.fit.equations.solve in the space of the rows: with A the rows of z about their mean, each times
the square root of its weight, and R what the start leaves of y,

    W = W0 + (A^T (A A^T + ridge * mean(diag A^T A) I)^-1 R)^T
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.runtime import ranks
from stages.core.sweep.gram import gram
from stages.fit.equations.factor import Cholesky
from stages.fit.equations.solve import Energies, check_finite, check_rows


class RowEquations:
    """At most ``count`` rows of z (rows, d_in) and y (rows, d_out), kept as they come."""

    def __init__(
        self,
        count: int,
        d_in: int,
        d_out: int,
        intercept: bool,
        dtype: torch.dtype,
        device: torch.device,
        name: str = "",
    ) -> None:
        self.intercept, self.name, self.count = intercept, name, 0
        self._complete = False
        self.z = torch.empty(count, d_in, dtype=dtype, device=device)
        self.y = torch.empty(count, d_out, dtype=dtype, device=device)
        self.weights = torch.empty(count, dtype=torch.float64, device=device)

    @staticmethod
    def bytes(count: int, d_in: int, d_out: int, itemsize: int) -> int:
        """Memory of the rows."""
        return itemsize * count * (d_in + d_out)

    @staticmethod
    def solve_bytes(count: int, columns: int, rows: int) -> int:
        """Memory of solving a block: A with what it is made from, A A^T and its factor, what is like y and W."""
        return 8 * (count * (2 * columns + 2 * count + 4 * rows) + 2 * columns * rows)

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """z (rows, d_in), y (rows, d_out)."""
        new = slice(self.count, self.count + len(z))
        self.z[new], self.y[new], self.weights[new] = z, y, weight
        self.count += len(z)

    def finished(self) -> None:
        """Those of all ranks, rank after rank, which ask for it together; of use to rank 0."""
        if ranks.count() == 1 or self._complete:
            return
        self._complete = True
        counts = ranks.said_by_all(self.count)
        start = sum(counts[: ranks.rank()])
        for own in (self.z, self.y, self.weights):
            here = own[: self.count].clone()
            own.zero_()[start : start + self.count] = here
        ranks.to_first(self.z, self.y, self.weights)
        self.count = sum(counts)

    def block(self, rows: Tensor, columns: Tensor) -> "RowSystem":
        """Outputs ``rows`` from inputs ``columns``."""
        self.finished()
        check_rows(self.count, self.name)
        A, mean_z = self.about(self.z, columns)
        return self.system(A, mean_z, rows)

    def system(self, A: Tensor, mean_z: Tensor, rows: Tensor, K: Tensor | None = None) -> "RowSystem":
        """Outputs ``rows`` from A (count, columns), the inputs about their mean. K: A A^T, where it is known."""
        target, mean_y = self.about(self.y, rows)
        check_finite(A, target, self.name)
        means = (mean_z, mean_y) if self.intercept else None
        return RowSystem(A, target, means, float(self.weights[: self.count].sum()), self.name, K)

    def absorb(self, other: "RowEquations") -> None:
        """Take the rows of another; its own are lost."""
        for what in ("z", "y", "weights"):
            own = [getattr(equations, what)[: equations.count] for equations in (self, other)]
            setattr(self, what, torch.cat(own))
            setattr(other, what, None)
        self.count += other.count

    def about(self, values: Tensor, entries: Tensor, middle: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Some entries of all rows about their mean, times the square root of the weight; the mean.

        middle: another one to take them about.
        """
        weights = self.weights[: self.count]
        own = values[: self.count, entries].double()
        if middle is None:
            middle = weights @ own / weights.sum() if self.intercept else own.new_zeros(len(entries))
        return own.sub_(middle).mul_(weights.sqrt()[:, None]), middle


@dataclass(frozen=True)
class RowSystem:
    """A block of the rows, as a ``System``. A (count, columns), target (count, rows)."""

    A: Tensor
    target: Tensor
    means: tuple[Tensor, Tensor] | None
    weight: float
    name: str
    K: Tensor | None = None  # A A^T, where it is known
    eps: float = 0.0  # that of its type

    def matrix(self) -> Tensor:
        return gram(self.A.T) if self.K is None else self.K.clone()

    def mean_diagonal(self, matrix: Tensor) -> float:
        return float(torch.linalg.vector_norm(self.A).square()) / self.A.shape[1]

    def left_by(self, start: Tensor, matrix: Tensor) -> Tensor:
        return torch.addmm(self.target, self.A, start.T, alpha=-1)

    def moved(self, start: Tensor, solved: Tensor) -> Tensor:
        return (solved.T @ self.A).add_(start)

    def energies(self, W: Tensor) -> Energies:
        given = self.A @ W.T
        return tuple(own.square().sum(0) for own in (given, self.target - given, self.target))

    def solved_by(self, factor: Cholesky, start: Tensor, penalty: float) -> tuple[Tensor, Energies]:
        """(K + r I) S = R, so that r S is what W leaves of the target."""
        solved = factor.solve_(self.left_by(start, self.A))
        left = penalty * solved
        energies = tuple(own.square().sum(0) for own in (self.target - left, left, self.target))
        return self.moved(start, solved), energies
