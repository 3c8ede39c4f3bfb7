"""The closed form for linear maps over positions: the copy of the shared units, a row for each image and unit.

minimise over W, b:   sum over images x and shared units c of   w(x) |W z(x, c) + b - y(x, c)|^2   +   the ridge

of stages.fit.equations.solve, where z and y are a unit's values at all positions. The copies of separate units stay
their own network's.
"""

import torch
from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.merged.mixed import MixMap
from stages.core.runtime import ranks
from stages.core.sweep.sweep import Sweep
from stages.fit.equations.apart import SumsApart
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.ridge import Losses, decide
from stages.fit.equations.solve import solve
from stages.fit.equations.trial import some, trial_bytes
from stages.fit.features import inputs_of, targets_of
from stages.fit.problem import LayerSolution
from stages.fit.setup import Setup


class Mixing:
    """Holds sums of products over the rows of one layer."""

    over_ranks = True

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def wants(self, node: Node) -> bool:
        """Whether there is a copy to fit: shared units, which are never a source's to the last bit."""
        return -1 in self._module(node).owners

    def bytes(self, node: Node, batch: int) -> int:
        """What it holds, beside the values that the sweep keeps."""
        d_out, d_in = self._module(node).weight.shape[1:3]
        network, size = self.setup.network, self._module(node).weight.element_size()
        values = sum(network.entries(name) for name in (node.inputs[0], node.name))
        equations = 2 if self.setup.ridge == "auto" else 1
        sums = equations * NormalEquations.bytes(d_in, d_out) + NormalEquations.add_bytes(d_in, d_out)
        solving = NormalEquations.solve_bytes(d_in, d_in, d_out)
        if equations > 1:
            solving = max(solving, trial_bytes(d_in, d_in, d_out))
        return sums + solving + 3 * batch * values * size

    def fit(self, node: Node, sweep: Sweep) -> LayerSolution | None:
        """Fit the layer and install its weights."""
        module = self._module(node)
        at, bias = module.owners.index(-1), "bias" in node.parameters
        start = module.weight[at].flatten(1)
        d_out, d_in = start.shape
        sizes, what = (d_in, d_out, bias), (start.device, node.name)
        equations = SumsApart([NormalEquations(*sizes, *what) for _ in range(sweep.parts)])
        for index, batch in enumerate(sweep.batches):
            z, y = inputs_of(self.setup, node, sweep, index), targets_of(self.setup, node, sweep, index)
            equations.parts[batch.held].add(_rows(module, z), _rows(module, y), sweep.weights[batch.task])
        equations.finished()
        if ranks.rank():
            return None
        every = tuple(torch.arange(n, device=start.device) for n in (d_out, d_in))
        start = start.double()
        losses = _losses_of_copies(equations, start) if sweep.parts > 1 else None
        ridge = decide(self.setup.ridge, losses)
        del losses  # and the matrices it has kept
        equations.join()
        found = solve(equations.block(*every), start, ridge)
        module.weight[at] = found.weight.to(module.weight.dtype).view_as(module.weight[at])
        if bias:
            module.bias[at] = found.bias.to(module.bias.dtype)
        return LayerSolution(float(found.residual.sum()), float(found.energy.sum()), ridge=ridge)

    def _module(self, node: Node) -> MixMap:
        return self.setup.network.map_of(node)


def _losses_of_copies(equations: SumsApart, start: Tensor) -> Losses:
    """Energy left of the images held out by what is learnt from the others, for each of some ridges."""
    rows, columns = (torch.arange(n, device=start.device) for n in start.shape)
    return equations.trial(some(rows), columns, some(start)).losses


def _rows(module: MixMap, value: Tensor) -> Tensor:
    """A merged value's shared units, (images * units * ..., positions)."""
    shared = (module.outputs.owner < 0).nonzero().flatten().to(value.device)
    own = value.index_select(module.dim, shared).movedim(module.attributes["dim"], -1)
    return own.reshape(-1, own.shape[-1])
