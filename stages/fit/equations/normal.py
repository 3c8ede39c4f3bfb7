"""The normal equations: sums of products over all rows, from which any block of a layer is solved.

The problem is that of stages.fit.equations.solve.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from stages.core.sweep.maps import RowSums
from stages.core.sweep.pooling import pool_sums
from stages.fit.equations.factor import Cholesky
from stages.fit.equations.solve import Energies, check_finite, check_rows


class Summed(ABC):
    """Sums over rows that the first ``block`` completes; no rows can be added after it.

    name: of the layer. eps: the relative rounding error of the products.
    """

    name: str
    eps: float
    _found: RowSums | None = None

    @abstractmethod
    def _finish(self) -> RowSums:
        """The completed sums, full matrices."""

    def _entries(self, columns: Tensor) -> Tensor:
        """Where the sums have these entries of rows."""
        return columns

    def finished(self) -> RowSums:
        """Of all ranks, which ask for it together; of use to rank 0.

        Raises InputError without any rows, or where they hold values that are not finite.
        """
        if self._found is None:
            own = self._finish()
            check_finite(own.G, own.C, self.name)
            weight, means = pool_sums(own.weight, own.G, own.C, own.yy, own.means)
            self._found = replace(own, weight=weight, means=means)
        return self._found

    def block(self, rows: Tensor, columns: Tensor) -> "NormalSystem":
        """Outputs ``rows`` from inputs ``columns``."""
        self.finished()
        return self._system(rows, self._entries(columns))

    def blocks(
        self, others: Sequence["Summed"], rows: Tensor, columns: Tensor, start: Tensor
    ) -> tuple[list["NormalSystem"], Tensor]:
        """The same of these sums and of others like them, and W0 (rows, columns) for them.

        Where they read all inputs, those are in the sums' own order: no matrix need be brought into another.
        """
        found, columns = self.finished(), self._entries(columns)
        if len(columns) == len(found.G):
            start = torch.empty_like(start).index_copy_(1, columns, start)
            columns = None
        return [own._system(rows, columns) for own in (self, *others)], start

    def _system(self, rows: Tensor, columns: Tensor | None) -> "NormalSystem":
        """columns: entries of the sums; None: all of them, as they are."""
        found = self.finished()
        if columns is None:
            mean_z, C = found.means and found.means[0], found.C[:, rows]
        else:
            mean_z, C = found.means and found.means[0][columns], found.C[columns[:, None], rows]
        means = None if found.means is None else (mean_z, found.means[1][rows])
        return NormalSystem(found.G, columns, C, found.yy[rows], means, found.weight, self.eps, self.name)

    def absorb(self, other: "Summed") -> None:
        """Take the rows of another; its sums are lost."""
        self._found = join_(self.finished(), other.finished())
        other._found = None


def join_(own: RowSums, other: RowSums) -> RowSums:
    """The sums over the rows of both, in the place of ``own``'s."""
    weight = own.weight + other.weight
    own.G.add_(other.G)
    own.C.add_(other.C)
    yy = own.yy + other.yy
    if own.means is None:
        return RowSums(weight, own.G, own.C, yy, None)
    apart = [b - a for a, b in zip(own.means, other.means, strict=True)]
    between = own.weight * other.weight / weight
    own.G.addr_(apart[0], apart[0], alpha=between)
    own.C.addr_(apart[0], apart[1], alpha=between)
    means = tuple(a + (other.weight / weight) * d for a, d in zip(own.means, apart, strict=True))
    return RowSums(weight, own.G, own.C, yy + between * apart[1].square(), means)


class NormalEquations(Summed):
    """Sums over rows of z (rows, d_in) and y (rows, d_out), kept in float64.

    Rows are shifted by the first batch's mean before they are multiplied when there is an intercept: the problem
    stays the same, and the products lose no digits to a common offset.
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
        if self._found is not None:
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

    def _finish(self) -> RowSums:
        """Moved to the mean where there is an intercept, and with the other half of G."""
        check_rows(self.weight, self.name)
        means = None
        if self.intercept:
            z, y = self.sum_z / self.weight, self.sum_y / self.weight
            self.C -= torch.outer(self.weight * z, y)
            self.yy -= self.weight * y.square()
            for block in blocks(len(z)):
                self.G[block, : block.stop] -= torch.outer(self.weight * z[block], z[: block.stop])
            means = self.shift_z.double() + z, self.shift_y.double() + y
        complete_gram(self.G)
        return RowSums(self.weight, self.G, self.C, self.yy, means)


@dataclass(frozen=True)
class NormalSystem:
    """A block of the sums, as a ``System``: of G (d, d) it reads ``columns``, all where None. C (columns, rows)."""

    G: Tensor
    columns: Tensor | None
    C: Tensor
    yy: Tensor
    means: tuple[Tensor, Tensor] | None
    weight: float
    eps: float
    name: str

    def matrix(self) -> Tensor:
        return self.G.clone() if self.columns is None else restricted(self.G, self.columns)

    def mean_diagonal(self, matrix: Tensor) -> float:
        return float(matrix.diagonal().mean())

    def left_by(self, start: Tensor, matrix: Tensor) -> Tensor:
        return torch.addmm(self.C, matrix, start.T, alpha=-1)

    def moved(self, start: Tensor, solved: Tensor) -> Tensor:
        return start + solved.T

    def energies(self, W: Tensor) -> Energies:
        """That given is the diagonal of W G W^T."""
        given = W.new_zeros(len(W))
        for block in blocks(W.shape[1]):
            part = self.G[block] if self.columns is None else restricted_rows(self.G, self.columns, block)
            given += ((W @ part.T) * W[:, block]).sum(1)
        return given, self.yy - 2 * (W * self.C.T).sum(1) + given, self.yy

    def solved_by(self, factor: Cholesky, start: Tensor, penalty: float) -> tuple[Tensor, Energies]:
        """(G + r I) W^T = C + r W0^T, so that w^T G w is what w has of C and of r (W0 - W)."""
        V = factor.solve_(torch.add(self.C, start.T, alpha=penalty))
        along, back = (V * self.C).sum(0), penalty * (V * (start.T - V)).sum(0)
        return V.T, (along + back, self.yy - along + back, self.yy)
