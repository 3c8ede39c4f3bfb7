"""The normal equations: sums of products over all rows, from which any block of a layer is solved.

The problem is that of stages.fit.equations.solve.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.sweep.gram import (
    BLOCK,
    add_gram,
    blocks,
    complete_gram,
    gram_bytes,
    restricted,
    restricted_rows,
)
from stages.fit.equations.solve import check_finite, check_rows


class NormalEquations:
    """Sums over rows of z (rows, d_in) and y (rows, d_out), kept in float64.

    Rows are shifted by the first batch's mean before they are multiplied when there is an intercept: the problem
    stays the same, and the products lose no digits to a common offset. The first ``block`` completes the sums; no
    rows can be added after it.
    """

    def __init__(self, d_in: int, d_out: int, intercept: bool, device: torch.device, name: str = "") -> None:
        self.intercept, self.name = intercept, name
        self.weight = 0.0
        options = {"dtype": torch.float64, "device": device}
        self.G = torch.zeros(d_in, d_in, **options)
        self.C = torch.zeros(d_in, d_out, **options)
        self.sum_z = torch.zeros(d_in, **options)
        self.sum_y = torch.zeros(d_out, **options)
        self.yy = torch.zeros(d_out, **options)
        self.shift_z = self.shift_y = None
        self.eps = torch.finfo(torch.float64).eps
        self._complete = False

    @staticmethod
    def bytes(d_in: int, d_out: int) -> int:
        """Memory of the sums."""
        return 8 * d_in * (d_in + d_out)

    @staticmethod
    def add_bytes(d_in: int, d_out: int) -> int:
        """Memory of adding to them, beside the rows."""
        return gram_bytes(d_in) + 12 * d_in * d_out

    @staticmethod
    def solve_bytes(d_in: int, columns: int, rows: int) -> int:
        """Memory of solving a block by Cholesky: G restricted, which becomes its own factor, and what is like C."""
        working = min(BLOCK, columns) * (d_in + columns)
        return 8 * (columns * columns + 2 * columns * rows + max(2 * columns * rows, working))

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """z (rows, d_in), y (rows, d_out): any float type; the products are taken in it, the sums in float64."""
        if self._complete:
            raise AssertionError(f"{self.name}: rows are added before the first block is solved")
        if self.shift_z is None:
            on = 1.0 if self.intercept else 0.0
            self.shift_z, self.shift_y = z.mean(0) * on, y.mean(0) * on
        z, y = z - self.shift_z, y - self.shift_y
        self.eps = max(self.eps, torch.finfo(z.dtype).eps)
        self.weight += weight * len(z)
        add_gram(self.G, z, weight)
        self.C += (z.T @ y).double().mul_(weight)
        self.sum_z += weight * z.sum(0).double()
        self.sum_y += weight * y.sum(0).double()
        self.yy += weight * y.square_().sum(0).double()

    def block(self, rows: Tensor, columns: Tensor) -> "NormalSystem":
        """Outputs ``rows`` from inputs ``columns``."""
        self._finish()
        means = None
        if self.intercept:
            mean_z = self.shift_z.double() + self.sum_z / self.weight
            mean_y = self.shift_y.double() + self.sum_y / self.weight
            means = mean_z[columns], mean_y[rows]
        C, yy = self.C[columns[:, None], rows], self.yy[rows]
        return NormalSystem(self.G, columns, C, yy, means, self.weight, self.eps, self.name)

    def _finish(self) -> None:
        """Move the sums to the mean where there is an intercept, and fill in the other half of G."""
        if self._complete:
            return
        check_rows(self.weight, self.name)
        if self.intercept:
            z, y = self.sum_z / self.weight, self.sum_y / self.weight
            self.C -= torch.outer(self.weight * z, y)
            self.yy -= self.weight * y.square()
            for block in blocks(len(z)):
                self.G[block, : block.stop] -= torch.outer(self.weight * z[block], z[: block.stop])
        complete_gram(self.G)
        check_finite(self.G, self.C, self.name)
        self._complete = True


@dataclass(frozen=True)
class NormalSystem:
    """A block of the sums, as a ``System``: of G (d, d) it reads ``columns``. C (columns, rows), yy (rows,)."""

    G: Tensor
    columns: Tensor
    C: Tensor
    yy: Tensor
    means: tuple[Tensor, Tensor] | None
    weight: float
    eps: float
    name: str

    def matrix(self) -> Tensor:
        return restricted(self.G, self.columns)

    def mean_diagonal(self, matrix: Tensor) -> float:
        return float(matrix.diagonal().mean())

    def left_by(self, start: Tensor, matrix: Tensor) -> Tensor:
        return torch.addmm(self.C, matrix, start.T, alpha=-1)

    def moved(self, start: Tensor, solved: Tensor) -> Tensor:
        return start + solved.T

    def energies(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """That given is the diagonal of W G W^T."""
        given = W.new_zeros(len(W))
        for block in blocks(len(self.columns)):
            given += ((W @ restricted_rows(self.G, self.columns, block).T) * W[:, block]).sum(1)
        return given, self.yy - 2 * (W * self.C.T).sum(1) + given, self.yy
