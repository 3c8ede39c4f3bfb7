"""The merged network: built from its real blocks, run, counted, saved and loaded.

A value of the merged network holds, for each group along its unit dimension, the units in the order
[separate of network 0 | shared | separate of network 1 | separate of network 2 | ...], so that the views of the
first two networks are contiguous slices. A linear map has one block of rows per column set: rows of shared units
read everything, rows of a network's separate units read that network's view only. The blocks between different
networks' separate units do not exist.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.artifacts import read_tensors, write_tensors
from stages.core.errors import InputError
from stages.core.graph import Graph, Layout, Node, node_parameters, run_graph, run_node
from stages.core.spec import State
from stages.core.trace import Trace, lay_out

FORMAT = "merged-network-1"


@dataclass(frozen=True)
class Task:
    """A source network's job: its name and the names of its classes."""

    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """How the source networks' entries lie in a merged value.

    positions: for each network, int64 (source width,): where its entry c is. owner: int64 (merged width,): the
    network an entry belongs to, -1 for shared.
    """

    positions: tuple[Tensor, ...]
    owner: Tensor

    @property
    def width(self) -> int:
        return len(self.owner)

    def view(self, network: int) -> Tensor:
        """The entries one network reads, ascending."""
        return torch.sort(self.positions[network]).values


def parts_of(layout: Layout, shared: Mapping[str, int], networks: int) -> Parts:
    """Parts of a value. ``shared``: k of each free group; a group that is not named is shared whole."""
    positions: list[list[Tensor]] = [[] for _ in range(networks)]
    owner, start = [], 0
    for segment in layout.segments:
        k, b = shared.get(segment.group, segment.size), segment.block
        s = segment.size - k
        for m in range(networks):
            own = start + (0 if m == 0 else k * b + m * s * b) + torch.arange(s * b)
            positions[m] += [start + s * b + torch.arange(k * b), own]
        owner += [torch.zeros(s * b), torch.full((k * b,), -1.0)]
        owner += [torch.full((s * b,), float(m)) for m in range(1, networks)]
        start += (k + networks * s) * b
    return Parts(tuple(torch.cat(p) for p in positions), torch.cat(owner).long())


def head_parts(classes: Sequence[int]) -> Parts:
    """Parts of the logits of separate label spaces: the networks' classes side by side."""
    starts = torch.tensor([0, *classes]).cumsum(0)
    positions = tuple(start + torch.arange(n) for start, n in zip(starts, classes, strict=False))
    return Parts(positions, torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(classes)))


@dataclass(frozen=True)
class Block:
    """Rows ``start:stop`` of a merged linear map read the input entries ``columns`` (ascending).

    owner: the network of the rows, -1 for shared, None where rows of several read the same columns.
    """

    start: int
    stop: int
    columns: Tensor
    owner: int | None


def blocks_of(inputs: Parts, outputs: Parts) -> list[Block]:
    """The blocks of a linear map, rows in the order of the merged output."""
    everything = torch.arange(inputs.width)
    runs = torch.unique_consecutive(outputs.owner, return_counts=True)
    blocks: list[Block] = []
    start = 0
    for owner, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
        columns = everything if owner < 0 else inputs.view(owner)
        previous = blocks[-1] if blocks else None
        if previous is not None and torch.equal(previous.columns, columns):
            blocks[-1] = Block(previous.start, start + count, columns, None)
        else:
            blocks.append(Block(start, start + count, columns, owner))
        start += count
    return blocks


class BlockMap(nn.Module):
    """A Linear or Conv2d with real blocks. ``weights[i]``: (rows, columns, *kernel) of block i."""

    def __init__(self, node: Node, inputs: Parts, outputs: Parts, kernel: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.node, self.inputs, self.outputs = node, inputs, outputs
        self.blocks = blocks_of(inputs, outputs)
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.zeros(b.stop - b.start, len(b.columns), *kernel)) for b in self.blocks]
        )
        self.bias = nn.Parameter(torch.zeros(outputs.width)) if bias else None
        self._slices = [_as_slice(block.columns, inputs.width) for block in self.blocks]
        for i, (block, found) in enumerate(zip(self.blocks, self._slices, strict=True)):
            self.register_buffer(f"columns{i}", block.columns if found is None else None, persistent=False)

    def forward(self, x: Tensor, owner: int | None = None) -> Tensor:
        """All rows, or only those of one network's block."""
        dim = 1 if self.node.operation == "conv2d" else x.dim() - 1
        outputs = []
        for i, block in enumerate(self.blocks):
            if owner is not None and block.owner not in (owner, None):
                continue
            bias = None if self.bias is None else self.bias[block.start : block.stop]
            y = self._map(self._read(x, i, dim), self.weights[i], bias)
            if owner is not None and block.owner is None:
                rows = (
                    (self.outputs.owner[block.start : block.stop] == owner).nonzero().flatten().to(x.device)
                )
                y = y.index_select(dim, rows)
            outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)

    def _read(self, x: Tensor, i: int, dim: int) -> Tensor:
        found = self._slices[i]
        if found is None:
            return x.index_select(dim, getattr(self, f"columns{i}"))
        return x if found == (0, x.shape[dim]) else x.narrow(dim, *found)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.node.operation == "linear":
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **self.node.attributes)


def _as_slice(columns: Tensor, width: int) -> tuple[int, int] | None:
    """(start, length) when the columns are contiguous."""
    if len(columns) == 0:
        return (0, 0)
    start, stop = int(columns[0]), int(columns[-1]) + 1
    return (start, stop - start) if stop - start == len(columns) else None


class MergedNetwork(nn.Module):
    """One network that does the jobs of N.

    ``net(x)`` gives the logits; for separate label spaces all heads side by side, and ``net(x, task="cub")`` those
    of one task. ``net.features(x)`` gives what the head(s) read.
    """

    def __init__(
        self,
        trace: Trace,
        tasks: Sequence[Task],
        labels: str,
        shared: Mapping[str, int],
        units: Mapping[str, Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Build it with all weights zero.

        shared: k of each free group. units: {group: int64 (N, d)}, each source's own units in merged order
        (shared first). about: what is written beside the weights (method, budget, preprocessing, hashes of the
        sources).
        """
        super().__init__()
        self.trace, self.tasks, self.labels = trace, tuple(tasks), labels
        self.shared = {name: int(shared[name]) for name in trace.spec.free}
        self.units = dict(units or {})
        self.about = dict(about or {})
        self._last = trace.graph.last_uses()
        output = trace.graph.output
        if labels == "separate" and output.operation != "linear":
            raise InputError(
                f"{output.name}: separate label spaces need a Linear as the last operation, found {output.operation}"
            )
        self.maps = nn.ModuleDict()
        for node in trace.graph.nodes:
            if node.linear:
                kernel = trace.parameters[node.parameters["weight"]][2:]
                parts = self.parts(node.inputs[0]), self.parts(node.name)
                self.maps[_key(node)] = BlockMap(node, *parts, kernel, "bias" in node.parameters)
            elif node.operation == "batch_norm":
                norm = nn.BatchNorm2d if len(trace.shapes[node.name]) == 4 else nn.BatchNorm1d
                affine = "weight" in node.parameters
                width = self.parts(node.name).width
                self.maps[_key(node)] = norm(width, eps=node.attributes["eps"], affine=affine)
        self.eval()

    @property
    def networks(self) -> int:
        return len(self.tasks)

    @property
    def head(self) -> Node | None:
        """The output node when it is a Linear: the head(s)."""
        output = self.trace.graph.output
        return output if output.operation == "linear" else None

    def parts(self, value: str) -> Parts:
        """How the sources' entries lie in the named value."""
        if self.labels == "separate" and value == self.trace.graph.output.name:
            return head_parts([len(task.classes) for task in self.tasks])
        return parts_of(self.trace.layouts[value], self.shared, self.networks)

    def run_node(self, node: Node, inputs: Sequence[Tensor]) -> Tensor:
        """One operation of the merged network."""
        if node.parameters:
            return self.maps[_key(node)](inputs[0])
        return run_node(node, inputs, {})

    def map_of(self, node: Node) -> nn.Module:
        """The BlockMap of a linear node, the batch norm of a batch_norm node."""
        return self.maps[_key(node)]

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """x: (n, ...) preprocessed images. Returns (n, classes)."""
        names = [t.name for t in self.tasks]
        if task is not None and self.labels == "shared":
            raise InputError(f"task: found {task!r}; allowed: none, the tasks share one label space")
        if task is not None and task not in names:
            raise InputError(f"task: found {task!r}; allowed: {', '.join(names)}")
        output = self.trace.graph.output
        values = self._run(x, output)
        if task is None:
            return self.run_node(output, [values[name] for name in output.inputs])
        return self.map_of(output)(values[output.inputs[0]], names.index(task))

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: (n, merged features)."""
        if self.head is None:
            raise InputError(
                f"the network ends in {self.trace.graph.output.operation}; allowed: a Linear head"
            )
        return self._run(x, self.head)[self.head.inputs[0]]

    def _run(self, x: Tensor, stop: Node) -> dict[str, Tensor]:
        """Run up to, not including, ``stop``; the values that are still needed."""
        values = {self.trace.graph.nodes[0].name: x}
        for node in self.trace.graph.nodes[1:]:
            if node is stop:
                break
            values[node.name] = self.run_node(node, [values[name] for name in node.inputs])
            for name in self._last[node.name]:
                del values[name]
        return values

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that ``load_merged`` reads without the code of the source networks."""
        header = {
            "format": FORMAT,
            "graph": [asdict(node) for node in self.trace.graph.nodes],
            "example": list(self.trace.shapes[self.trace.graph.nodes[0].name]),
            "shapes": self.trace.parameters,
            "tasks": [asdict(task) for task in self.tasks],
            "labels": self.labels,
            "shared": self.shared,
            "about": self.about,
        }
        units = {f"units/{name}": value for name, value in self.units.items()}
        write_tensors(path, {**self.state_dict(), **units}, {"merged": json.dumps(header, sort_keys=True)})


def _key(node: Node) -> str:
    return f"{node.name}_"  # a plain name may be one that nn.ModuleDict has itself, such as "values"


def load_merged(path: str | Path, device: str | torch.device = "cpu") -> MergedNetwork:
    """Read a merged network. Raises InputError when the file is missing, damaged or something else."""
    tensors, metadata = read_tensors(path)
    try:
        header = json.loads(metadata.get("merged", "{}"))
        if header.get("format") != FORMAT:
            raise InputError(f"not a merged network (format {header.get('format')!r}; allowed: {FORMAT})")
        return _from_header(header, tensors).to(device).eval()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path}: its header and its tensors do not fit together ({what})") from error


def _from_header(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> MergedNetwork:
    nodes = tuple(Node(**{**node, "inputs": tuple(node["inputs"])}) for node in header["graph"])
    trace = lay_out(Graph(nodes), header["shapes"], header["example"])
    tasks = [Task(task["name"], tuple(task["classes"])) for task in header["tasks"]]
    units = {
        name.removeprefix("units/"): tensors.pop(name) for name in list(tensors) if name.startswith("units/")
    }
    network = MergedNetwork(trace, tasks, header["labels"], header["shared"], units, header["about"])
    network.to(next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32))
    network.load_state_dict(tensors)  # after the type is set: it copies into what is there
    return network


def exact_entries(network: MergedNetwork) -> dict[str, Tensor]:
    """For each value which entries are a copy of a source's: bool (merged width,) by node name.

    They are what the images alone or separate units that read only such entries lead to. Fitting and batch-norm
    recomputation leave them as they are, so that everything separate gives exactly the sources' features.
    """
    exact: dict[str, Tensor] = {}
    for node in network.trace.graph.nodes:
        parts = network.parts(node.name)
        if node.operation == "input":
            exact[node.name] = torch.ones(parts.width, dtype=torch.bool)
        elif node.linear:
            read = exact[node.inputs[0]]
            inputs = network.parts(node.inputs[0])
            whole = torch.tensor([bool(read[p].all()) for p in inputs.positions])
            exact[node.name] = (parts.owner >= 0) & whole[parts.owner]
        elif node.operation == "concatenate":
            exact[node.name] = torch.cat([exact[name] for name in node.inputs])
        else:
            read = [exact[name] for name in node.inputs]
            repeated = [e.repeat_interleave(parts.width // len(e)) for e in read]  # flatten widens a unit
            exact[node.name] = torch.stack(repeated).all(0)
    return exact


@dataclass(frozen=True)
class Source:
    """One of the networks to be merged, as a trace and its tensors (units already in merged order)."""

    trace: Trace
    state: State
    task: Task
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.trace.graph

    def run_node(self, node: Node, inputs: Sequence[Tensor]) -> Tensor:
        """One operation of the source network."""
        return run_node(node, inputs, node_parameters(node, self.state))

    def __call__(self, x: Tensor) -> Tensor:
        """The source's own logits."""
        return run_graph(self.graph, self.state, x)
