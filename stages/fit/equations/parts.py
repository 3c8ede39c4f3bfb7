"""The normal equations of a map that reads parts of its inputs alone: a small problem for each, which do not touch.

Grouped convolutions are such maps: in a merged network a part is shared or one network's, and reads its own part of the
input only. The problem of each is that of stages.fit.equations.solve.
"""

import torch
from torch import Tensor

from stages.core.sweep.pooling import pool_sums
from stages.fit.equations.normal import NormalSystem
from stages.fit.equations.solve import check_finite, check_rows


class PartEquations:
    """Sums over rows of z (rows, parts * a) and y (rows, parts * b), shifted by the first batch's mean, in float64."""

    def __init__(self, parts: int, intercept: bool, name: str = "") -> None:
        self.parts, self.intercept, self.name = parts, intercept, name
        self.weight, self.eps = 0.0, torch.finfo(torch.float64).eps

    @staticmethod
    def bytes(parts: int, a: int, b: int) -> int:
        """Memory of the sums and of the solves."""
        return 8 * parts * (4 * a * a + 5 * a * b)

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """The products are taken in the type of z, the sums in float64."""
        z, y = z.view(len(z), self.parts, -1), y.view(len(y), self.parts, -1)
        if self.weight == 0:
            on = 1.0 if self.intercept else 0.0
            self.shift_z, self.shift_y = z.mean(0) * on, y.mean(0) * on
            self.G = self.C = self.sum_z = self.sum_y = self.yy = 0.0
        z, y = (z - self.shift_z).transpose(0, 1), (y - self.shift_y).transpose(0, 1)  # (parts, rows, a)
        self.eps = max(self.eps, torch.finfo(z.dtype).eps)
        self.weight += weight * z.shape[1]
        self.G = self.G + weight * (z.mT @ z).double()
        self.C = self.C + weight * (z.mT @ y).double()
        self.sum_z = self.sum_z + weight * z.sum(1).double()
        self.sum_y = self.sum_y + weight * y.sum(1).double()
        self.yy = self.yy + weight * y.square().sum(1).double()

    def systems(self) -> list[NormalSystem]:
        """One for each part, over all ranks."""
        check_rows(self.weight, self.name)
        check_finite(self.G, self.C, self.name)
        G, C, yy, means = self.G, self.C, self.yy, None
        if self.intercept:
            z, y = self.sum_z / self.weight, self.sum_y / self.weight
            G = G - self.weight * z[:, :, None] * z[:, None, :]
            C = C - self.weight * z[:, :, None] * y[:, None, :]
            yy = yy - self.weight * y.square()
            means = self.shift_z.double() + z, self.shift_y.double() + y
        weight, means = pool_sums(self.weight, G, C, yy, means)
        means = [None] * self.parts if means is None else list(zip(*means, strict=True))
        every = torch.arange(G.shape[1], device=G.device)
        return [
            NormalSystem(*own, mean, weight, self.eps, self.name)
            for *own, mean in zip(G, [every] * self.parts, C, yy, means, strict=True)
        ]
