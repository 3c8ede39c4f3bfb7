"""The rows of a layer in two parts: those that its map is learnt from, and those held out by which its ridge is chosen.

Without a choice all are of the first. Each kind of equations has its own pair; both are used alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.sweep.gram import gram
from stages.fit.equations.normal import Summed
from stages.fit.equations.rows import RowEquations, RowSystem
from stages.fit.equations.solve import System, check_finite, check_rows
from stages.fit.equations.trial import RowTrial, SumTrial, Trial


class TwoParts:
    """Equations of each part."""

    def __init__(self, parts: Sequence[Summed | RowEquations]) -> None:
        self.parts = list(parts)

    def finished(self) -> None:
        """Those of all ranks, which ask for it together; of use to rank 0."""
        for own in self.parts:
            own.finished()

    def join(self) -> None:
        """Those held out are as the others from here on."""
        while len(self.parts) > 1:
            self.parts[0].absorb(self.parts.pop())

    def block(self, rows: Tensor, columns: Tensor) -> System:
        """Outputs ``rows`` from inputs ``columns`` over all rows, after they were joined."""
        return self.parts[0].block(rows, columns)


class SumsApart(TwoParts):
    """Sums over the rows of each part."""

    def trial(self, rows: Tensor, columns: Tensor, start: Tensor) -> Trial:
        """Of outputs ``rows`` from inputs ``columns``. start: W0 (rows, columns) float64."""
        learnt, held = self.parts
        systems, start = learnt.blocks([held], rows, columns, start)
        return SumTrial(*systems, start)


@dataclass
class _Products:
    """Of rows X (count, columns), about ``middle`` and times the square root of their weights: all of them, X X^T."""

    columns: Tensor
    X: Tensor
    K: Tensor
    middle: Tensor

    def centred(self, roots: Tensor) -> None:
        """About their mean from here on. roots: of the weights, (count,)."""
        off = roots @ self.X / (total := roots.square().sum())
        self.X.addr_(roots, off, alpha=-1)
        self.middle += off
        across = self.K @ roots / total
        across -= (0.5 * (roots @ across) / total) * roots
        self.K.addr_(across, roots, alpha=-1).addr_(roots, across, alpha=-1)


class RowsApart(TwoParts):
    """The rows of each part as they are. What chooses a block's ridge and what solves it after that share products."""

    _last: _Products | None = None

    @staticmethod
    def bytes(count: int, columns: int) -> int:
        """Memory of the products."""
        return 8 * count * (columns + count)

    def trial(self, rows: Tensor, columns: Tensor, start: Tensor) -> Trial:
        """Of outputs ``rows`` from inputs ``columns``. start: W0 (rows, columns) float64."""
        self._last = None
        learnt, held = self.parts
        n, m = learnt.count, held.count
        check_rows(n, learnt.name)
        X = learnt.z.new_empty(n + m, len(columns), dtype=torch.float64)
        X[:n], middle = learnt.about(learnt.z, columns)
        X[n:] = held.about(held.z, columns, middle)[0]
        target, mean_y = learnt.about(learnt.y, rows)
        left = torch.cat([target, held.about(held.y, rows, mean_y)[0]]).addmm_(X, start.T, alpha=-1)
        check_finite(X, left, learnt.name)
        K = gram(X.T)
        self._last = _Products(columns, X, K, middle)
        scale = float(K.diagonal()[:n].sum()) / len(columns)
        return RowTrial(K[:n, :n], K[n:, :n], left[:n], left[n:], scale)

    def block(self, rows: Tensor, columns: Tensor) -> RowSystem:
        (whole,), last, self._last = self.parts, self._last, None
        if last is None or not torch.equal(last.columns, columns):
            return whole.block(rows, columns)
        if whole.intercept:
            last.centred(whole.weights[: whole.count].sqrt())
        return whole.system(last.X, last.middle, rows, last.K)
