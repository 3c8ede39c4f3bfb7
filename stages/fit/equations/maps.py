"""The normal equations of a convolution from its maps, without its rows (stages.core.sweep.maps)."""

from collections.abc import Sequence

from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.sweep.maps import MapSums, RowSums, map_entries
from stages.core.sweep.shifted import Plan
from stages.fit.equations.normal import NormalSystem
from stages.fit.equations.solve import check_finite, check_rows


class MapEquations:
    """Sums over the rows of maps z (n, c, h, w) and y (n, d_out, ...), from which any block of a layer is solved.

    The first ``block`` completes the sums; no maps can be added after it.
    """

    def __init__(
        self, node: Node, kernel: Sequence[int], size: Sequence[int], intercept: bool, name: str = ""
    ) -> None:
        """size: (h, w) of z."""
        self.name, self._sums = name, MapSums(node, kernel, size, intercept)
        self._found: RowSums | None = None

    @staticmethod
    def bytes(plan: Plan, c: int, d_out: int, equations: int, adding: int, solving: int) -> int:
        """The most memory that so many take, given that of adding to them and of solving a block."""
        sums, found = MapSums.bytes(plan, c, d_out), MapSums.finished_bytes(plan, c, d_out)
        finishing = sums + found + MapSums.finish_bytes(plan, c, d_out)
        others = (equations - 1) * max(sums, found)
        return max(equations * sums + adding, others + max(finishing, found + solving))

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Some images; the products are taken in their type, the sums in float64."""
        if self._found is not None:
            raise AssertionError(f"{self.name}: maps are added before the first block is solved")
        self._sums.add(z, y, weight)

    def block(self, rows: Tensor, columns: Tensor) -> NormalSystem:
        """Outputs ``rows`` from inputs ``columns``."""
        if self._found is None:
            check_rows(self._sums.weight, self.name)
            self._found = self._sums.finish()
            check_finite(self._found.G, self._found.C, self.name)
        found, c = self._found, len(self._sums.shift_z)
        columns = map_entries(columns, self._sums.plan.taps, c)
        means = None if found.means is None else (found.means[0][columns], found.means[1][rows])
        C = found.C[columns[:, None], rows]
        return NormalSystem(
            found.G, columns, C, found.yy[rows], means, found.weight, self._sums.eps, self.name
        )
