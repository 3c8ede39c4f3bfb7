"""The normal equations of a convolution from its maps, without its rows (stages.core.sweep.maps)."""

from collections.abc import Sequence

from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.sweep.maps import MapSums, RowSums, map_entries
from stages.core.sweep.shifted import Plan
from stages.fit.equations.normal import Summed
from stages.fit.equations.solve import check_rows


class MapEquations(Summed):
    """Sums over the rows of maps z (n, c, h, w) and y (n, d_out, ...), from which any block of a layer is solved."""

    def __init__(
        self, node: Node, kernel: Sequence[int], size: Sequence[int], intercept: bool, name: str = ""
    ) -> None:
        """size: (h, w) of z."""
        self.name, self._sums = name, MapSums(node, kernel, size, intercept)

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

    def _finish(self) -> RowSums:
        check_rows(self._sums.weight, self.name)
        return self._sums.finish()

    def _entries(self, columns: Tensor) -> Tensor:
        return map_entries(columns, self._sums.plan.taps, len(self._sums.shift_z))

    @property
    def eps(self) -> float:
        return self._sums.eps
