"""A linear map beside units (stages.core.graph.mixing) in a merged network: a copy of its weights for every owner.

What it does to a unit is the same for all units of a network, so that separate units are read by their own network's
weights and shared ones by a copy of their own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.core.graph.nodes import Node
from stages.core.graph.operations import OPERATIONS
from stages.core.graph.trace import Trace
from stages.core.merged.arrangement import Arrangement, pieces_of


def copies_of(arrangement: Arrangement) -> list[int]:
    """The owners of a merged value that have a copy, ascending; -1 for shared units."""
    return arrangement.owner.unique().tolist()


class MixMap(nn.Module):
    """weight: (copies, d_out, d_in, ...), bias: (copies, d_out). owners: whose each copy is, -1 for shared units."""

    def __init__(self, node: Node, trace: Trace, arrangement: Arrangement) -> None:
        super().__init__()
        self.node, self.outputs, self.attributes = node, arrangement, dict(node.attributes)
        self.dim, self.owners = trace.layouts[node.name].dim, copies_of(arrangement)
        self.pieces = pieces_of(arrangement)
        for role, name in node.parameters.items():
            shape = (len(self.owners), *trace.parameters[name])
            self.register_parameter(role, nn.Parameter(torch.zeros(shape)))

    def copy(self, owner: int) -> dict[str, Tensor]:
        """The tensors of one copy by role."""
        at = self.owners.index(owner)
        return {role: parameter[at] for role, parameter in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        """x: a whole merged value."""
        run = OPERATIONS[self.node.operation].run
        if len(self.owners) == 1:
            return run([x], self.copy(self.owners[0]), self.attributes)
        parts = [
            run([x.narrow(self.dim, p.start, p.stop - p.start)], self.copy(p.owner), self.attributes)
            for p in self.pieces
        ]
        return torch.cat(parts, self.dim)

    @torch.no_grad()
    def average(self, states: list[Mapping[str, Tensor]]) -> None:
        """Shared units get the mean of the networks' weights, the others their own network's."""
        for role, name in self.node.parameters.items():
            for at, owner in enumerate(self.owners):
                found = states[owner][name] if owner >= 0 else sum(s[name] for s in states) / len(states)
                getattr(self, role)[at] = found

    def kept(self, exact: Tensor) -> Tensor:
        """Which copies are read by a unit that is a source's to the last bit: bool (copies,). exact: (width,)."""
        return torch.tensor(
            [owner >= 0 and bool(exact[self.outputs.owner == owner].any()) for owner in self.owners]
        )
