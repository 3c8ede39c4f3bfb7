"""Least squares for grouped convolutions: every part of the channels is a small problem of its own.

In a merged network a part is shared or one network's, and reads its own part of the input only, so the problems do
not touch. The objective of each is that of stages.fit.equations.normal.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.core.graph.folding import norm_scale
from stages.core.graph.nodes import Node
from stages.core.sweep.sweep import Sweep
from stages.fit.average import average_vector, entry_shares
from stages.fit.equations.normal import check_finite, check_rows, solve_symmetric

if TYPE_CHECKING:
    from stages.fit.visitor import Fitter


class PartEquations:
    """Sums over rows of z (rows, parts, a) and y (rows, parts, b), shifted by the first batch's mean, in float64."""

    def __init__(self, intercept: bool) -> None:
        self.intercept, self.weight, self.eps = intercept, 0.0, torch.finfo(torch.float64).eps

    @staticmethod
    def bytes(parts: int, a: int, b: int) -> int:
        """Memory of the sums and of the solves."""
        return 8 * parts * (4 * a * a + 5 * a * b)

    def add_rows(self, parts: int, weight: float, z: Tensor, y: Tensor) -> None:
        """The same of rows as a layer sees them, all parts side by side."""
        self.add(z.view(len(z), parts, -1), y.view(len(y), parts, -1), weight)

    def add(self, z: Tensor, y: Tensor, weight: float) -> None:
        """The products are taken in the type of z, the sums in float64."""
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

    def solve(self, start: Tensor, ridge: float, name: str) -> "PartSolution":
        """start: (parts, b, a), what the ridge holds to."""
        check_rows(self.weight, name)
        check_finite(self.G, self.C, name)
        G, C, yy, start = self.G, self.C, self.yy, start.double()
        if self.intercept:
            z, y = self.sum_z / self.weight, self.sum_y / self.weight
            G = G - self.weight * z[:, :, None] * z[:, None, :]
            C = C - self.weight * z[:, :, None] * y[:, None, :]
            yy = yy - self.weight * y.square()
        right = C - G @ start.mT
        penalties = ridge * G.diagonal(dim1=1, dim2=2).mean(1)
        change = [
            solve_symmetric(*one, name, self.eps) for one in zip(G, penalties.tolist(), right, strict=True)
        ]
        W = start + torch.stack(change).mT  # (parts, b, a)
        left = yy - 2 * (W * C.mT).sum(2) + (W @ G * W).sum(2)
        bias = mean = variance = torch.zeros_like(yy)
        if self.intercept:
            mean = (W @ (self.shift_z.double() + z)[:, :, None])[..., 0]
            bias = self.shift_y.double() + y - mean
            variance = ((W @ (G / self.weight)) * W).sum(2).clamp(min=0)
        return PartSolution(W, bias, left.clamp(min=0), yy.clamp(min=0), torch.stack([mean, variance]))


class PartSolution:
    """weight (parts, b, a); bias, residual and energy (parts, b); moments of the outputs (2, parts, b)."""

    def __init__(
        self, weight: Tensor, bias: Tensor, residual: Tensor, energy: Tensor, moments: Tensor
    ) -> None:
        self.weight, self.bias, self.moments = weight, bias, moments
        self.residual, self.energy = residual, energy


@torch.no_grad()
def fit_grouped(fitter: "Fitter", node: Node, sweep: Sweep, fitted: Tensor) -> float:
    """Fit one grouped convolution and install it; rows that are copies (``fitted`` False) stay.

    Returns the relative residual energy.
    """
    module, norm = fitter.network.map_of(node), fitter.norms.get(node.name)
    parts = module.groups
    fitted = fitted.to(module.weight.device)
    equations = PartEquations(module.bias is not None or norm is not None)
    for index, batch in enumerate(sweep.batches):
        fitter.each_rows(node, sweep, index, partial(equations.add_rows, parts, sweep.weights[batch.task]))
    found = equations.solve(
        _start(fitter, node).view(parts, -1, equations.G.shape[1]), fitter.ridge, node.name
    )
    module.weight[fitted] = found.weight.view_as(module.weight)[fitted].to(module.weight.dtype)
    fitter.install_offset(node, norm, fitted, found.bias.view(-1), found.moments.view(2, -1))
    rows = fitted.view(parts, -1)
    energy = float(found.energy[rows].sum())
    return float(found.residual[rows].sum()) / energy if energy > 0 else 0.0


def _start(fitter: "Fitter", node: Node) -> Tensor:
    """The average of the maps that are fitted, with the norm behind where that is folded in."""
    if node.name not in fitter.folded:
        return fitter.network.map_of(node).weight
    norm, scaled = fitter.folded[node.name], []
    for source in fitter.sources:
        weight = source.state[node.parameters["weight"]]
        scaled.append(weight * norm_scale(norm, source.state).view(-1, *[1] * (weight.dim() - 1)))
    shares = entry_shares(fitter.network, fitter.alignment, node.name, scaled[0])
    return average_vector(scaled, fitter.network.arrangement(node.name), shares)
