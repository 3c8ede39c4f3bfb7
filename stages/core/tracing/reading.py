"""ATen calls -> nodes of the table of operations.

What depends on parameters and constants alone is folded (stages.core.tracing.folding); what moves entries about is made
one node (stages.core.tracing.rearranging); dropout, identities and aliases vanish. Nothing is guessed: a call that is
not told here is an error that names it, the module it is in and the user's line.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx
from torch import Tensor, nn

from stages.core.graph.nodes import Graph
from stages.core.graph.places import CodePlace
from stages.core.tracing.calls import joins, linear, lines, moving, norms, places, reductions
from stages.core.tracing.complex_pairs import CALLS_OF_PAIRS, FOURIER, pairs_apart
from stages.core.tracing.copies import unwrap
from stages.core.tracing.distances import distances_as_maps
from stages.core.tracing.edges import ADDED_UP, edges_as_maps
from stages.core.tracing.export import export, opname
from stages.core.tracing.folding import Folding
from stages.core.tracing.groups_beside import groups_apart
from stages.core.tracing.heads_apart import heads_apart
from stages.core.tracing.mixed_weights import kernels_apart
from stages.core.tracing.neighbours import places_of_each_image
from stages.core.tracing.one_channel import channel_kept
from stages.core.tracing.one_unit import unit_kept
from stages.core.tracing.radix import radix_apart
from stages.core.tracing.reader import SKIPPED, Reader, place_of
from stages.core.tracing.rewriting import of_known_shape, reduced_apart, unrepeated
from stages.core.tracing.sampled_taps import DEFORMABLE, taps_apart
from stages.core.tracing.side_by_side import places_changed


@dataclass(frozen=True)
class Reading:
    """A network as a graph.

    folding: what of its state is computed from other tensors. made_of: the call that each node was read from. kind: the
    network's type.
    """

    graph: Graph
    folding: Folding
    made_of: Mapping[str, torch.fx.Node]
    kind: str

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """A network's tensors, on its device: its state dict and what is folded."""
        return self.folding.state(unwrap(module))

    def place_of(self, node: str) -> CodePlace | None:
        """Where in the user's code a node was read."""
        return place_of(self.made_of[node], self.kind) if node in self.made_of else None


def read(module: nn.Module, example: Tensor) -> Reading:
    """Read a module, which is left as it is.

    example: (n, ...), of which the shape counts. Raises InputError naming the operation, the module's path and the
    user's line when there is no rule for it.
    """
    module = unwrap(module)
    exported = export(module, example, _has_rule)
    of_known_shape(exported.graph)
    taps_apart(exported.graph)
    pairs_apart(exported.graph, exported.tensors, type(module).__name__)
    distances_as_maps(exported.graph, exported.tensors)
    places_of_each_image(exported.graph, exported.tensors)
    edges_as_maps(exported.graph, exported.tensors)
    unrepeated(exported.graph, exported.tensors)
    places_changed(exported.graph)
    heads_apart(exported.graph)
    groups_apart(exported.graph)
    unit_kept(exported.graph)
    channel_kept(exported.graph)
    reduced_apart(exported.graph)
    radix_apart(exported.graph)
    kernels_apart(exported.graph, exported.tensors)
    folding = Folding(exported.graph, exported.tensors)
    reader = Reader(module, exported.graph, folding, CALLS)
    return Reading(Graph(tuple(reader.read())), folding, reader.made_of, type(module).__name__)


def _has_rule(fx: torch.fx.Node) -> bool:
    name = opname(fx)
    return (
        name in SKIPPED
        or name in CALLS
        or name in FOURIER
        or name in CALLS_OF_PAIRS
        or name == "cdist"
        or name in DEFORMABLE
        or name.strip("_") in ADDED_UP
        or name.strip("_") in CALLS
        or name.startswith(("sym_", "_assert"))
    )


CALLS = (
    joins.JOINS
    | linear.MAPS
    | norms.NORM_CALLS
    | reductions.REDUCTION_CALLS
    | lines.LINE_CALLS
    | moving.MOVING
    | places.PLACES
)
"""ATen name -> what makes nodes of a call, from its arguments by name."""
