"""Ridge regression of one block of a layer: what every kind of equations is solved by.

minimise over W (d_out, d_in) and b:   sum_x w(x) |W z(x) + b - y(x)|^2  +  ridge * mean(diag G) * |W - W0|^2

With an intercept, b is free and G is the second moment of z about its mean; without, G = sum w z z^T. Rows are
accumulated first, by the equations of this folder; each block of them is a ``System``, which is factorised and solved.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError
from stages.fit.equations.factor import Cholesky, Spectrum, factorise_


@dataclass(frozen=True)
class Solution:
    """One block of a layer: the map, what it leaves over and what it gives."""

    weight: Tensor  # (d_out, d_in)
    bias: Tensor  # (d_out,), zero without an intercept
    residual: Tensor  # (d_out,) energy left over
    energy: Tensor  # (d_out,) energy of y, about its mean with an intercept
    moments: Tensor | None  # (2, d_out) mean, variance of W z over the rows seen; None without an intercept


Energies = tuple[Tensor, Tensor, Tensor]
"""Of what a map gives, of what it leaves over and of y, (d_out,) each."""


class System(Protocol):
    """The rows of one block, accumulated: outputs y (d_out) from inputs z (d_in), float64.

    name: of the layer. weight: the sum of the rows' weights. eps: the relative rounding error in the matrix. means: of
    z (d_in,) and of y (d_out,); None without an intercept.
    """

    name: str
    weight: float
    eps: float
    means: tuple[Tensor, Tensor] | None

    def matrix(self) -> Tensor:
        """The symmetric matrix that is factorised, made anew."""
        ...

    def mean_diagonal(self, matrix: Tensor) -> float:
        """That of G."""
        ...

    def left_by(self, start: Tensor, matrix: Tensor) -> Tensor:
        """What W0 (d_out, d_in) leaves of the targets, on the matrix's side."""
        ...

    def moved(self, start: Tensor, solved: Tensor) -> Tensor:
        """W: the start moved by the solution of the matrix's system."""
        ...

    def energies(self, W: Tensor) -> Energies:
        """Of what W gives, of what it leaves over and of y."""
        ...

    def solved_by(self, factor: Cholesky, start: Tensor, penalty: float) -> tuple[Tensor, Energies]:
        """W and its energies by a factor of the matrix with the penalty: what solves the system tells both."""
        ...


def solve(system: System, start: Tensor, ridge: float) -> Solution:
    """The ridge regression of one block. start: W0, (d_out, d_in)."""
    W, energies = _solved(system, start.double(), ridge)
    given, residual, energy = (own.clamp(min=0) for own in energies)
    if system.means is None:
        return Solution(W, torch.zeros_like(energy), residual, energy, None)
    mean_z, mean_y = system.means
    mean = W @ mean_z
    return Solution(W, mean_y - mean, residual, energy, torch.stack([mean, given / system.weight]))


def left_over(system: System, weight: Tensor, bias: Tensor | None) -> float:
    """Energy that a solution, of other rows, leaves of the rows of ``system``. bias: None without an intercept."""
    residual = system.energies(weight)[1].sum()
    if system.means is None:
        return float(residual)
    mean_z, mean_y = system.means
    off = weight @ mean_z + bias - mean_y
    return float(residual + system.weight * off.square().sum())


def _solved(system: System, start: Tensor, ridge: float) -> tuple[Tensor, Energies]:
    matrix = system.matrix()
    penalty = ridge_penalty(ridge, system.mean_diagonal(matrix))
    factor = factorise_(matrix, penalty, system.matrix, system.name, system.eps)
    if isinstance(factor, Cholesky):
        return system.solved_by(factor, start, penalty)
    return moved_by(system, factor, start, system.matrix())


def moved_by(
    system: System, factor: Cholesky | Spectrum, start: Tensor, matrix: Tensor
) -> tuple[Tensor, Energies]:
    """W and its energies where what solves the system tells of W alone."""
    W = system.moved(start, factor.solve_(system.left_by(start, matrix)))
    return W, system.energies(W)


def ridge_penalty(ridge: float, mean_diagonal: float) -> float:
    """What the ridge adds to every diagonal entry of G."""
    return ridge * mean_diagonal


def check_rows(count: float, name: str) -> None:
    """Gate: there is something to fit to."""
    if count == 0:
        raise InputError(f"{name}: no rows to fit it to; allowed: images of every task")


def check_finite(inputs: Tensor, targets: Tensor, name: str) -> None:
    """Gate: numbers alone, and none so large that it could not be squared."""
    if not all(torch.isfinite(own.sum()) for own in (inputs, targets)):  # a single one that is not shows
        raise InputError(
            f"{name}: its inputs or targets hold NaN or infinite values; allowed: finite images, and a precision "
            "that reaches as far as the values"
        )
