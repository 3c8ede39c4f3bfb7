"""Least squares through the normal equations: accumulate, then solve as often as there are blocks.

minimise over W (d_out, d_in) and b:   sum_x w(x) |W z(x) + b - y(x)|^2  +  ridge * mean(diag G) * |W - W0|^2

With an intercept, b is free and G is the second moment of z about its mean; without, G = sum w z z^T.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError
from stages.core.sweep.gram import (
    BLOCK,
    add_gram,
    blocks,
    complete_gram,
    gram_bytes,
    restricted,
    restricted_rows,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solution:
    """One block of a layer: the map, what it leaves over and what it gives."""

    weight: Tensor  # (d_out, d_in)
    bias: Tensor  # (d_out,), zero without an intercept
    residual: Tensor  # (d_out,) energy left over
    energy: Tensor  # (d_out,) energy of y, about its mean with an intercept
    moments: (
        Tensor | None
    )  # (2, d_out) mean and variance of W z over the rows seen; None without an intercept


class NormalEquations:
    """Sums over rows of z (rows, d_in) and y (rows, d_out), kept in float64.

    Rows are shifted by the first batch's mean before they are multiplied when there is an intercept: the problem
    stays the same, and the products lose no digits to a common offset. The first ``solve`` completes the sums; no
    rows can be added after it.
    """

    def __init__(self, d_in: int, d_out: int, intercept: bool, device: torch.device) -> None:
        self.intercept = intercept
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
            raise RuntimeError("rows are added before the first solve")
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

    def solve(self, rows: Tensor, columns: Tensor, start: Tensor, ridge: float, name: str = "") -> Solution:
        """One block: outputs ``rows`` from inputs ``columns``; start: W0, (rows, columns)."""
        self._finish(name)
        C, yy = self.C[columns[:, None], rows], self.yy[rows]
        W = self._weight(columns, C, start.double(), ridge, name)
        given = self._energy(W, columns)
        residual = (yy - 2 * (W * C.T).sum(1) + given).clamp(min=0)
        if not self.intercept:
            return Solution(W, torch.zeros_like(yy), residual, yy.clamp(min=0), None)
        mean = W @ (self.shift_z.double() + self.sum_z / self.weight)[columns]
        bias = (self.shift_y.double() + self.sum_y / self.weight)[rows] - mean
        moments = torch.stack([mean, (given / self.weight).clamp(min=0)])
        return Solution(W, bias, residual, yy.clamp(min=0), moments)

    def _finish(self, name: str) -> None:
        """Move the sums to the mean where there is an intercept, and fill in the other half of G."""
        if self._complete:
            return
        check_rows(self.weight, name)
        if self.intercept:
            z, y = self.sum_z / self.weight, self.sum_y / self.weight
            self.C -= torch.outer(self.weight * z, y)
            self.yy -= self.weight * y.square()
            for block in blocks(len(z)):
                self.G[block, : block.stop] -= torch.outer(self.weight * z[block], z[: block.stop])
        complete_gram(self.G)
        check_finite(self.G, self.C, name)
        self._complete = True

    def _weight(self, columns: Tensor, C: Tensor, start: Tensor, ridge: float, name: str) -> Tensor:
        """W, (rows, columns)."""
        G = restricted(self.G, columns)
        penalty = ridge * float(G.diagonal().mean())
        right = torch.addmm(C, G, start.T, alpha=-1)
        if penalty > 0:
            failed = solve_definite_(G, penalty, right)
            if failed == 0:
                return start + right.T
            _warn(name, failed, len(G))
            G = restricted(self.G, columns)
            right = torch.addmm(C, G, start.T, alpha=-1)
        return start + solve_pseudo(G, penalty, right, self.eps).T

    def _energy(self, W: Tensor, columns: Tensor) -> Tensor:
        """The diagonal of W G W^T, (rows,)."""
        found = W.new_zeros(len(W))
        for block in blocks(len(columns)):
            found += ((W @ restricted_rows(self.G, columns, block).T) * W[:, block]).sum(1)
        return found


def check_rows(count: float, name: str) -> None:
    """Gate: there is something to fit to."""
    if count == 0:
        raise InputError(f"{name}: no rows to fit it to; allowed: images of every task")


def check_finite(inputs: Tensor, targets: Tensor, name: str) -> None:
    """Gate: numbers alone, and none so large that it could not be squared."""
    if not all(torch.isfinite(own.sum()) for own in (inputs, targets)):  # a single one that is not shows
        raise InputError(
            f"{name}: its inputs or targets hold NaN or infinite values; allowed: finite images, and a storage "
            "type that reaches as far as the values"
        )


def solve_symmetric(G: Tensor, penalty: float, right: Tensor, name: str = "", eps: float = 0.0) -> Tensor:
    """(G + penalty I)^-1 right by Cholesky; by the pseudo-inverse (eigenvalues) where that cannot work.

    eps: the relative rounding error in G, when that is larger than its type's.
    """
    if penalty > 0:
        solution = right.clone()
        failed = solve_definite_(G.clone(), penalty, solution)
        if failed == 0:
            return solution
        _warn(name, failed, len(G))
    return solve_pseudo(G, penalty, right, eps)


def solve_definite_(G: Tensor, penalty: float, right: Tensor) -> int:
    """Put (G + penalty I)^-1 right into ``right``; G is lost. Returns 0, or the pivot where Cholesky failed.

    LAPACK works column by column: the transpose of a symmetric matrix is that matrix in this order, so that the
    factor takes its place and no other is made.
    """
    G.diagonal().add_(penalty)
    info = torch.empty((), dtype=torch.int32, device=G.device)
    factor, info = torch.linalg.cholesky_ex(G.mT, out=(G.mT, info))
    if int(info) == 0:
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        right.copy_(torch.linalg.solve_triangular(factor.mT, half, upper=True, out=half))
    return int(info)


def solve_pseudo(G: Tensor, penalty: float, right: Tensor, eps: float = 0.0) -> Tensor:
    """The smallest solution, so that what the data does not determine stays at the start."""
    values, vectors = torch.linalg.eigh(G)
    values = values + penalty
    kept = values > values.max().clamp(min=0) * len(G) * max(eps, torch.finfo(G.dtype).eps)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def _warn(name: str, pivot: int, d: int) -> None:
    log.warning("%s: Cholesky failed at pivot %d of %d; solved by eigenvalues", name, pivot, d)
