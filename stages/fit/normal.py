"""Least squares through the normal equations: accumulate, then solve as often as there are blocks.

minimise over W (d_out, d_in) and b:   sum_x w(x) |W z(x) + b - y(x)|^2  +  ridge * mean(diag G) * |W - W0|^2

With an intercept, b is free and G is the second moment of z about its mean; without, G = sum w z z^T.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solution:
    """weight (d_out, d_in), bias (d_out,) (zero without an intercept), residual: energy left over / energy of y."""

    weight: Tensor
    bias: Tensor
    residual: Tensor  # (d_out,) energy left over
    energy: Tensor  # (d_out,) energy of y, about its mean with an intercept


class NormalEquations:
    """Sums over rows of z (rows, d_in) and y (rows, d_out), kept in float64.

    Rows are shifted by the first batch's mean before they are multiplied when there is an intercept: the problem
    stays the same, and the products lose no digits to a common offset.
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

    @staticmethod
    def bytes(d_in: int, d_out: int) -> int:
        """Memory of the sums and of a solve: G, its restriction, that with the ridge and the factor; C and the like."""
        return 8 * (4 * d_in * d_in + 5 * d_in * d_out)

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """z (rows, d_in), y (rows, d_out): any float type; the products are taken in it, the sums in float64."""
        if self.shift_z is None:
            on = 1.0 if self.intercept else 0.0
            self.shift_z, self.shift_y = z.mean(0) * on, y.mean(0) * on
        z, y = z - self.shift_z, y - self.shift_y
        self.eps = max(self.eps, torch.finfo(z.dtype).eps)
        self.weight += weight * len(z)
        self.G += weight * (z.T @ z).double()
        self.C += weight * (z.T @ y).double()
        self.sum_z += weight * z.sum(0).double()
        self.sum_y += weight * y.sum(0).double()
        self.yy += weight * y.square().sum(0).double()

    def solve(self, rows: Tensor, columns: Tensor, start: Tensor, ridge: float, name: str = "") -> Solution:
        """One block: outputs ``rows`` from inputs ``columns``; start: W0, (rows, columns)."""
        self._check(name)
        start = start.double()
        G = self.G[columns][:, columns]
        C = self.C[columns][:, rows]
        yy = self.yy[rows]
        if self.intercept:
            z, y = self.sum_z[columns] / self.weight, self.sum_y[rows] / self.weight
            G.addr_(z, z, alpha=-self.weight)  # in place: these are copies, and G is what memory goes to
            C.addr_(z, y, alpha=-self.weight)
            yy = yy - self.weight * y.square()
        penalty = ridge * G.diagonal().mean()
        change = solve_symmetric(G, penalty, C - G @ start.T, name, self.eps)
        W = start + change.T
        residual = yy - 2 * (W * C.T).sum(1) + (W @ G * W).sum(1)
        bias = torch.zeros(len(rows), dtype=torch.float64, device=W.device)
        if self.intercept:
            bias = self.shift_y.double()[rows] + y - W @ (self.shift_z.double()[columns] + z)
        return Solution(W, bias, residual.clamp(min=0), yy.clamp(min=0))

    def _check(self, name: str) -> None:
        if self.weight == 0:
            raise InputError(f"{name}: no rows to fit it to; allowed: images of every task")
        if not (torch.isfinite(self.G).all() and torch.isfinite(self.C).all()):
            raise InputError(
                f"{name}: its inputs or targets hold NaN or infinite values; allowed: finite images, and a storage "
                "type that reaches as far as the values"
            )

    def output_moments(self, W: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of W z over the rows seen, W (d_out, columns). Needs an intercept."""
        z = self.sum_z[columns] / self.weight
        covariance = self.G[columns][:, columns] / self.weight - torch.outer(z, z)
        mean = W @ (self.shift_z.double()[columns] + z)
        return mean, (W @ covariance * W).sum(1).clamp(min=0)


def solve_symmetric(
    G: Tensor, penalty: Tensor | float, right: Tensor, name: str = "", eps: float = 0.0
) -> Tensor:
    """(G + penalty I)^-1 right by Cholesky; by the pseudo-inverse (eigenvalues) where that cannot work.

    The pseudo-inverse gives the smallest solution, so what the data does not determine stays at the start. eps: the
    relative rounding error in G, when that is larger than its type's.
    """
    d = len(G)
    if float(penalty) > 0:
        ridged = G.clone()
        ridged.diagonal().add_(penalty)
        factor, info = torch.linalg.cholesky_ex(ridged)
        if int(info) == 0:
            return torch.cholesky_solve(right, factor)
        log.warning("%s: Cholesky failed at pivot %d of %d; solved by eigenvalues", name, int(info), d)
    values, vectors = torch.linalg.eigh(G)
    values = values + penalty
    kept = values > values.max().clamp(min=0) * d * max(eps, torch.finfo(G.dtype).eps)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))
