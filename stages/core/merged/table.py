"""What became of every layer of a merged network: the table that ``MergedNetwork.report`` gives."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.core.graph.nodes import Node
from stages.core.graph.source import Task
from stages.core.graph.trace import Trace
from stages.core.merged.arrangement import Arrangement
from stages.core.merged.blocks import BlockMap
from stages.core.merged.tuning import layer_by_layer

if TYPE_CHECKING:
    import pandas as pd

TABLE_COLUMNS = ("units", "shared", "separate", "merged", "residual", "macs", "counted", "executed")
FRACTIONS = ("residual", "counted", "executed")
ATTENTION = "attention"  # what multiplies, and has no weights of its own


class Tabled(Protocol):
    """What is asked of a merged network."""

    trace: Trace
    tasks: tuple[Task, ...]
    labels: str
    about: dict[str, Any]
    corrected: list[str]
    instead: Any

    def arrangement(self, value: str) -> Arrangement: ...

    def has_map(self, node: Node) -> bool: ...

    def map_of(self, node: Node) -> nn.Module: ...

    def __call__(self, x: Tensor, task: str | None = None) -> Tensor: ...


def layer_table(network: Tabled) -> "pd.DataFrame":
    """A line for each layer, one for the whole, and one for refining where there was some.

    units: of a source's output; shared, separate: how many of them one merged unit stands for, and how many stay apart;
    merged: its width. residual: what the fit left of its targets' energy; behind refining, what is left of the loss on
    the images held out. macs: of one source, for one image. counted, executed: those of the merged network in
    multiples of it, as its weights say and as one run multiplies. Heads of separate label spaces are in both.
    """
    import pandas as pd  # here: for those who look at it

    trace, done = network.trace, executed(network)
    lines = [_layer(network, node, done) for node in trace.graph.nodes if node.linear or node.grouped]
    hidden = [node for node in trace.graph.nodes if trace.hidden_macs(node) and not node.grouped]
    if hidden:
        per_entry = [(node, trace.hidden_macs(node)) for node in hidden]
        lines.append(
            {
                "layer": ATTENTION,
                "macs": sum(each * trace.layouts[node.name].width for node, each in per_entry),
                "counted": sum(each * network.arrangement(node.name).width for node, each in per_entry),
                "executed": done.get(ATTENTION, 0),
            }
        )
    lines.append(
        {
            "layer": "whole network",
            **{key: sum(own[key] for own in lines) for key in ("macs", "counted", "executed")},
        }
    )
    for line in lines:
        line["residual"] = network.about.get("residuals", {}).get(line["layer"])
        line |= {key: line[key] / max(line["macs"], 1) for key in ("counted", "executed")}
    if network.about.get("refined"):
        lines.append(_refining(network.about["refined"]))
    table = pd.DataFrame(lines, columns=["layer", *TABLE_COLUMNS]).set_index("layer")
    return table.astype({key: "Float64" if key in FRACTIONS else "Int64" for key in TABLE_COLUMNS}).round(4)


def _layer(network: Tabled, node: Node, done: Mapping[str, int]) -> dict[str, Any]:
    trace, owner = network.trace, network.arrangement(node.name).owner
    name, positions, shared = node.parameters["weight"], trace.positions(node), int((owner < 0).sum())
    units = trace.layouts[node.name].width
    return {
        "layer": node.path,
        "units": units,
        "shared": shared,
        "separate": max(units - shared, 0),
        "merged": len(owner),
        "macs": positions * torch.Size(trace.parameters[name]).numel(),
        "counted": positions * sum(weight.numel() for weight in network.map_of(node).weights),
        "executed": done.get(node.name, 0),
    }


def _refining(record: Mapping[str, Any]) -> dict[str, Any]:
    losses = record.get("held_out", {})
    left = losses["kept"] / losses["fitted"] if losses.get("fitted") else None
    return {"layer": f"refining: step {record['kept']} of {record['steps']} kept", "residual": left}


@torch.no_grad()
def executed(network: Tabled) -> dict[str, int]:
    """Multiply-accumulates of one run on one image, by node; of what no layer's weights are in, under ``attention``."""
    network = layer_by_layer(network)
    nodes = network.trace.graph.nodes
    owners = {}
    for node in nodes:
        if network.has_map(node):
            module = network.map_of(node)
            whole = module.whole() if isinstance(module, BlockMap) else None  # of a layer that runs at once
            for tensor in [*module.parameters(), *([] if whole is None else [whole])]:
                owners[tensor.untyped_storage().data_ptr()] = node.name
    example = torch.zeros(network.trace.shapes[nodes[0].name], dtype=_type_of_inputs(network))
    parameter = next(network.parameters())
    example = example.to(parameter.device, parameter.dtype if example.is_floating_point() else None)
    task = network.tasks[0].name if network.labels == "shared" and network.corrected else None
    with Counting(owners) as count:
        network(example, task=task)
    return count.macs


def _type_of_inputs(network: Tabled) -> torch.dtype:
    first, *nodes = network.trace.graph.nodes
    read = {node.operation for node in nodes if first.name in node.inputs}
    return torch.int64 if "embedding" in read else torch.float32


class Counting(TorchDispatchMode):
    """Counts multiply-accumulates by whose weights they are with. owners: storage of a tensor -> name."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # here: with Triton behind it

        self.formulas = flop_registry
        self.owners = owners
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func.overloadpacket)
        if formula is not None:
            tensors = [value for value in args if isinstance(value, Tensor)]
            names = [self.owners.get(tensor.untyped_storage().data_ptr()) for tensor in tensors]
            name = next((own for own in names if own is not None), ATTENTION)
            operations = formula(*args, **(kwargs or {}), out_val=found)
            self.macs[name] = self.macs.get(name, 0) + operations // 2
        return found
