"""Sums over the rows of a layer, of maps where that is faster, and how a batch is added to them."""

from functools import partial

from torch import Tensor

from stages.fit.equations.maps import MapEquations
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.rows import RowEquations
from stages.fit.layer import Layer
from stages.fit.problem import LayerProblem

Sums = MapEquations | NormalEquations


def sums_of(layer: Layer) -> Sums:
    """Empty ones."""
    if layer.maps is not None:
        return MapEquations(layer.node, layer.kernel, layer.map_size, layer.intercept, layer.node.name)
    return NormalEquations(layer.d_in, layer.d_out, layer.intercept, layer.device, layer.node.name)


def add(problem: LayerProblem, into: Sums | RowEquations, z: Tensor, y: Tensor, weight: float) -> None:
    """Some images' inputs and targets, in the merged network's entries."""
    if isinstance(into, MapEquations):
        into.add(z, y, weight)
    else:
        problem.by_rows(z, y, partial(into.add, weight=weight))
