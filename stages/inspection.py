"""What a network looks like to the merge: its groups of units, who writes and reads them, and what they cost.

from stages import inspect
print(inspect(network, images))
"""

from dataclasses import dataclass

from torch import Tensor, nn

from stages.core.graph.source import Task
from stages.core.graph.trace import Trace
from stages.core.merged.cost import source_cost, split_cost
from stages.core.runtime.errors import InputError
from stages.core.runtime.surroundings import undisturbed
from stages.core.tracing.sources import traced_sources
from stages.core.units.groups import PermutationGroup
from stages.given import checked_network, run_once
from stages.loaders import check_ordinary, kind_of

SHOWN = 3  # layers of a column of the table


@dataclass(frozen=True)
class Group:
    """Units that are matched, shared or separated together.

    inside: how many units lie in each of them (channels of a head), which are put in order but not separated; several
    where it holds several kinds. fixed: images or logits, which stay as they are. written_by, read_by: module paths of
    the linear maps and attentions whose outputs, or inputs, are these units. macs: multiply-accumulates of one image on
    the connections that write or read them, which is what a second copy of the whole group adds; 0 where it is fixed.
    """

    name: str
    size: int
    inside: tuple[int, ...]
    fixed: bool
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Inspection:
    """A network that can be merged. macs: of one image; parameters: trained ones. As text, a table."""

    network: str
    macs: int
    parameters: int
    groups: tuple[Group, ...]

    def __str__(self) -> str:
        from tabulate import tabulate  # here: for those who look at it

        rows = [
            (
                group.name,
                f"{group.size}" + "".join(f" x {size}" for size in group.inside),
                _some(group.written_by),
                _some(group.read_by),
                "fixed" if group.fixed else f"{group.macs:,}",
                "" if group.fixed else f"{group.macs / self.macs:.1%}",
            )
            for group in self.groups
        ]
        head = f"{self.network}: {self.macs:,} multiply-accumulates, {self.parameters:,} parameters"
        columns = ("group", "units", "written by", "read by", "MACs", "share")
        align = ("left", "right", "left", "left", "right", "right")
        return f"{head}\n\n{tabulate(rows, columns, colalign=align, disable_numparse=True)}"


def inspect(network: nn.Module, example: Tensor) -> Inspection:
    """The groups of a network's units, in the order of the forward pass, traced and verified as ``merge`` does.

    example: a batch of images as the network takes them, (n, ...); their values do not matter. The network is left
    alone. Raises InputError where ``merge`` would refuse the network: the operation, the module's path and what to do.
    """
    with undisturbed():
        return _inspect(checked_network(network, "network"), example)


def _inspect(network: nn.Module, example: Tensor) -> Inspection:
    if not isinstance(example, Tensor) or not example.dim() or not len(example):
        raise InputError(f"example: found {kind_of(example)}; allowed: a tensor of one image or more")
    check_ordinary(example, "example")
    run_once(network, example, "example")
    (source,) = traced_sources([network], [Task("network", ())], example)
    traced, state = source.trace, source.state
    whole = {name: group.size for name, group in traced.spec.free.items()}
    macs = source_cost(traced, state, "shared", "macs")

    def added(name: str) -> int:
        return split_cost(traced, state, "shared", "macs", {**whole, name: 0}, 2) - macs

    return Inspection(
        type(network).__name__,
        macs,
        source_cost(traced, state, "shared", "parameters"),
        tuple(_group(traced, g, 0 if g.fixed else added(g.name)) for g in traced.spec.groups.values()),
    )


def _group(traced: Trace, group: PermutationGroup, macs: int) -> Group:
    inside = tuple(inner.size for inner in traced.spec.inner.values() if inner.outer == group.name)
    layers = [node for node in traced.graph.nodes if node.fitted or traced.hidden_macs(node)]
    writing = tuple(n.path for n in layers if _lies_on(traced, n.name, group))
    reading = tuple(n.path for n in layers if any(_lies_on(traced, name, group) for name in n.inputs))
    return Group(group.name, group.size, inside, group.fixed, writing, reading, macs)


def _lies_on(traced: Trace, value: str, group: PermutationGroup) -> bool:
    return any(segment.group == group.name for segment in traced.layouts[value].segments)


def _some(layers: tuple[str, ...]) -> str:
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return ", ".join(layers[:SHOWN]) + more
