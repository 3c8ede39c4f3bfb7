"""The merged network: built from its real blocks, run, counted, saved and loaded.

How the units lie in its values, and which blocks exist, is in stages.core.merged.blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.graph import rules
from stages.core.graph.inputs import as_taken, is_cast
from stages.core.graph.nodes import Node
from stages.core.graph.operations import OPERATIONS, run_node
from stages.core.graph.source import Task
from stages.core.graph.trace import Trace
from stages.core.merged.arrangement import Arrangement, Piece, arrange, arrange_heads, held_pieces
from stages.core.merged.blocks import BlockMap
from stages.core.merged.plain import make_plain
from stages.core.merged.table import layer_table
from stages.core.merged.tuning import Folded, Tuning, tune
from stages.core.merged.unit_layers import Moved, merged_layer
from stages.core.merged.written import write_merged
from stages.core.runtime.errors import InputError, shown

if TYPE_CHECKING:
    import pandas as pd


class MergedNetwork(nn.Module):
    """One network that does the jobs of N.

    ``net(x)`` gives the logits; for separate label spaces all heads side by side, and ``net(x, task="cub")`` those
    of one task. ``net.features(x)`` gives what the head(s) read. A network that was corrected for each task
    (recalibrate: tact) must be told the task.
    """

    def __init__(
        self,
        trace: Trace,
        tasks: Sequence[Task],
        labels: str,
        shared: Mapping[str, int],
        units: Mapping[str, Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
        dense: bool = False,
    ) -> None:
        """Build it with all weights zero.

        shared: k of each free group. units: {group: int64 (N, d)}, each source's own units in merged order
        (shared first). about: what is written beside the weights (method, budget, preprocessing, hashes of the
        sources). dense: every unit may read every unit; otherwise the blocks between networks do not exist.
        """
        super().__init__()
        self.trace, self.tasks, self.labels, self.dense = trace, tuple(tasks), labels, dense
        self.shared = {name: int(shared[name]) for name in trace.spec.free}
        for name, k in self.shared.items():
            if not 0 <= k <= trace.spec.groups[name].size:
                raise InputError(
                    f"group {name}: {k} shared units; allowed: from 0 to {trace.spec.groups[name].size}"
                )
        self.units = dict(units or {})
        self.about = dict(about or {})
        self.instead: Folded | None = None  # what runs in its place, where that is faster (tuning)
        self.folded: set[str] = set()  # batch norms that are in the linear maps before them
        self._arrangements: dict[str, Arrangement] = {}
        self._last = trace.graph.last_uses()
        self.head, output = trace.graph.head, trace.graph.output
        self._logits, self._tail = trace.graph.logits, trace.graph.tail
        if labels == "separate" and self.head is None:
            raise InputError(
                f"{output.name}: separate label spaces need a linear map whose outputs are the classes, up to the "
                f"output; found {output.operation}"
            )
        self._pieces = {name: self._held(name) for name in trace.layouts}
        self.maps = nn.ModuleDict()
        for node in trace.graph.nodes:
            if node.linear:
                kernel = trace.parameters[node.parameters["weight"]][2:]
                ends = self.arrangement(node.inputs[0]), self.arrangement(node.name)
                held = self._pieces[node.inputs[0]], self._pieces[node.name]
                self.maps[_key(node)] = BlockMap(node, *ends, kernel, "bias" in node.parameters, dense, held)
            elif node.operation == "batch_norm":
                norm = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(
                    len(trace.shapes[node.name]), nn.BatchNorm1d
                )
                affine = "weight" in node.parameters
                width = self.arrangement(node.name).width
                self.maps[_key(node)] = norm(width, eps=node.attributes["eps"], affine=affine)
            elif node.name in trace.moved:
                self.maps[_key(node)] = self._moved(node)
            elif len(node.inputs) > 1 and self._alike(node):
                self._line_up(node)
            elif node.inputs:
                layer = merged_layer(
                    node, trace, self.arrangement(node.inputs[0]), self.arrangement(node.name)
                )
                if layer is not None:
                    self.maps[_key(node)] = layer
        self._piecewise = {node.name for node in trace.graph.nodes[1:] if self._runs_apart(node)}
        self._built = {name: tensor.shape for name, tensor in self.state_dict().items()}
        self.eval()

    def _moved(self, node: Node) -> Moved:
        read = [self.arrangement(name) for name in node.inputs]
        starts = torch.tensor([0, *(own.width for own in read)]).cumsum(0)
        positions = [
            torch.cat([own.positions[m] + at for own, at in zip(read, starts.tolist(), strict=False)])
            for m in range(self.networks)
        ]
        side = Arrangement(tuple(positions), torch.cat([own.owner for own in read]))
        layout = self.trace.layouts[node.name]
        return Moved(self.trace.moved[node.name], layout.dim, side, self.arrangement(node.name))

    def _alike(self, node: Node) -> bool:
        """Whether a node joins values entry by entry, or puts them side by side along another dimension than units'."""
        layout = self.trace.layouts[node.name]
        if node.operation == "concatenate":
            return node.attributes["dim"] % len(self.trace.shapes[node.name]) != layout.dim
        return OPERATIONS[node.operation].rule is rules.same

    def _line_up(self, node: Node) -> None:
        """Values that are joined have their entries alike, also where one has zeros in the place of units."""
        layout = self.trace.layouts[node.name]
        for i, name in enumerate(node.inputs):
            own = self.trace.layouts[name]
            if own.segments == layout.segments or own.width not in (1, layout.width):
                continue
            if own.dim + len(self.trace.shapes[node.name]) - len(self.trace.shapes[name]) != layout.dim:
                continue  # it has no units, or they are inside the other's
            parts = self.arrangement(name), self.arrangement(node.name)
            if own.width == layout.width:
                self.maps[f"{_key(node)}{i}"] = Moved(range(own.width), own.dim, *parts)
            elif parts[0].width > 1:  # one entry for all of a part
                self.maps[f"{_key(node)}{i}"] = Moved([0] * layout.width, own.dim, *parts)

    def _lined_up(self, node: Node, inputs: Sequence[Tensor]) -> list[Tensor]:
        keys = [f"{_key(node)}{i}" for i in range(len(inputs))]
        return [self.maps[key](x) if key in self.maps else x for key, x in zip(keys, inputs, strict=True)]

    def _runs_apart(self, node: Node) -> bool:
        """Whether a node without parameters may run on each piece of its inputs alone."""
        lined_up = any(f"{_key(node)}{i}" in self.maps for i in range(len(node.inputs)))
        if node.parameters or self.has_map(node) or lined_up:
            return False
        held = {len(self._pieces[name]) for name in (*node.inputs, node.name)}
        dims = {self.trace.layouts[name].dim for name in node.inputs}
        if len(held) > 1 or len(dims) > 1 or node.operation in ("attention", "matmul", "concatenate"):
            return False
        return node.operation != "rearrange" or len(node.attributes["atoms"][dims.pop()]) == 1

    @property
    def networks(self) -> int:
        return len(self.tasks)

    def arrangement(self, value: str) -> Arrangement:
        """How the sources' entries lie in the named value."""
        if value not in self._arrangements:
            self._arrangements[value] = self._arrange(value)
        return self._arrangements[value]

    def _arrange(self, value: str) -> Arrangement:
        if self.labels == "separate" and value in self._logits:
            return arrange_heads([len(task.classes) for task in self.tasks])
        return arrange(self.trace.layouts[value], self.shared, self.networks)

    def _held(self, value: str) -> list[Piece]:
        """The pieces in which a value is held: of a dense network all but the heads' logits are whole."""
        arrangement, apart = self.arrangement(value), self.labels == "separate" and value in self._logits
        return [Piece(-1, 0, arrangement.width)] if self.dense and not apart else held_pieces(arrangement)

    def entries(self, value: str) -> int:
        """How many numbers the named value of one image holds."""
        own = self.trace.shapes[value].numel()
        return own // self.trace.layouts[value].width * self.arrangement(value).width

    def run_node(self, node: Node, inputs: Sequence[Tensor], task: int | None = None) -> Tensor:
        """One operation of the merged network. task: whose correction is applied, where there is one."""
        if not self.has_map(node):
            return run_node(node, self._lined_up(node, inputs), {})
        return self._corrected(node, self.maps[_key(node)](*inputs), task, slice(None))

    def set_correction(self, node: Node, correction: Tensor) -> None:
        """Scale and shift what a node gives, for each task its own way. correction: (2, T, merged width)."""
        self.register_buffer(f"correction_{node.name}", correction)

    @property
    def corrected(self) -> list[str]:
        """Names of the nodes whose values are corrected for each task."""
        return [n.name for n in self.trace.graph.nodes if f"correction_{n.name}" in self._buffers]

    @property
    def expected_shapes(self) -> dict[str, torch.Size]:
        """Of the tensors of its state as it was built, and of its corrections: what a file of it holds."""
        corrections = {
            f"correction_{name}": torch.Size([2, self.networks, self.arrangement(name).width])
            for name in self.corrected
        }
        return {**self._built, **corrections}

    def _corrected(self, node: Node, value: Tensor, task: int | None, entries: slice) -> Tensor:
        correction = self._buffers.get(f"correction_{node.name}")
        if correction is None or task is None:
            return value
        dim = self.trace.layouts[node.name].dim
        scale, shift = correction[:, task, entries].view(
            2, *[-1 if d == dim else 1 for d in range(value.dim())]
        )
        return value * scale + shift

    def has_map(self, node: Node) -> bool:
        """Whether a node has parameters or entries of its own here: ``map_of`` gives them."""
        return _key(node) in self.maps

    def map_of(self, node: Node) -> nn.Module:
        """The BlockMap of a linear node, the batch norm of a batch_norm node, the MergedLayer of others."""
        return self.maps[_key(node)]

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """x: (n, ...) preprocessed images. Returns (n, classes). Raises InputError for what no source takes."""
        index, output = self._index(task), self.trace.graph.output
        if self.instead is not None and self._undisturbed(x):
            return self.instead(as_taken(self.trace, x, next(self.parameters())), index)
        if (
            index is None and self.corrected
        ):  # separate heads side by side, each with its own task's corrections
            return torch.cat([self(x, task=own.name) for own in self.tasks], 1)
        if self.labels == "shared":
            values = self._run(x, output, index)
            pieces = self._on_pieces(output, [values[name] for name in output.inputs], index)
            return self._joined(output.name, pieces)
        return self._heads(self._run(x, self.head, index)[self.head.inputs[0]], index)

    def _undisturbed(self, x: Tensor) -> bool:
        """Whether nothing is asked that a folded network in its place would not give: gradients, other types."""
        casts = is_cast(x.device)
        return not (self.training or torch.is_grad_enabled() or casts or torch.compiler.is_compiling())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "instead": None}

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the plain network, as it reads neither blocks nor names of tasks."""
        return self.plain()

    def _heads(self, features: Sequence[Tensor], task: int | None) -> Tensor:
        """The logits of separate label spaces from what the heads read, and what follows them, head by head."""
        tail = self._tail
        every = task is None or any(node.parameters for node in tail)
        pieces = self.map_of(self.head).on_pieces(features, None if every else task)
        dim = self.trace.layouts[self.head.name].dim
        for node in tail:
            if self.has_map(node):
                sizes = [piece.shape[dim] for piece in pieces]
                pieces = list(self.run_node(node, [torch.cat(pieces, dim)]).split(sizes, dim))
            else:
                pieces = [run_node(node, [piece], {}) for piece in pieces]
            dim = self.trace.layouts[node.name].dim
        if task is not None:
            return pieces[task if every else 0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def logits(self, features: Tensor, task: int | None = None) -> Tensor:
        """The output from what ``features`` gives: all heads' side by side, or one task's where labels are separate."""
        if self.labels == "separate":
            return self._heads(self._apart(self.head.inputs[0], features), task)
        for node in (self.head, *self._tail):
            features = self.run_node(node, [features], task)
        return features

    def features(self, x: Tensor, task: str | None = None) -> Tensor:
        """What the head reads: (n, merged features)."""
        if self.head is None:
            raise InputError(
                f"the network ends in {self.trace.graph.output.operation}; allowed: a linear map, its head"
            )
        index = self._index(task)
        if index is None and self.corrected:
            raise InputError(f"task: not given; allowed: {', '.join(own.name for own in self.tasks)}")
        name = self.head.inputs[0]
        return self._joined(name, self._run(x, self.head, index)[name])

    def _index(self, task: str | None) -> int | None:
        names = [own.name for own in self.tasks]
        if task is None and not (self.corrected and self.labels == "shared"):
            return None
        if task is not None and self.labels == "shared" and not self.corrected:
            raise InputError(f"task: found {shown(task)}; allowed: none, the tasks share one label space")
        if not isinstance(task, str) or task not in names:
            raise InputError(f"task: found {shown(task)}; allowed: {', '.join(names)}")
        return names.index(task)

    def _run(
        self,
        x: Tensor,
        stop: Node | None,
        task: int | None,
        look: Callable[[Node, list[list[Tensor]]], None] | None = None,
    ) -> dict[str, list[Tensor]]:
        """Run up to, not including, ``stop``; the values that are still needed, in the pieces they are held in.

        look: is shown each node and its inputs before it runs.
        """
        values = {self.trace.graph.nodes[0].name: [as_taken(self.trace, x, next(self.parameters()))]}
        for node in self.trace.graph.nodes[1:]:
            if node is stop:
                break
            inputs = [values[name] for name in node.inputs]
            if look is not None:
                look(node, inputs)
            values[node.name] = self._on_pieces(node, inputs, task)
            for name in self._last[node.name]:
                del values[name]
        return values

    def _on_pieces(self, node: Node, inputs: Sequence[list[Tensor]], task: int | None) -> list[Tensor]:
        if node.name in self.folded:
            return inputs[0]
        if not (
            node.name in self._piecewise
            or node.linear
            or (node.operation == "batch_norm" and not self.training)
        ):
            whole = [self._joined(name, own) for name, own in zip(node.inputs, inputs, strict=True)]
            return self._apart(node.name, self.run_node(node, whole, task))
        if not node.parameters:
            return [run_node(node, own, {}) for own in zip(*inputs, strict=True)]
        pieces = self.map_of(node).on_pieces(inputs[0]) if node.linear else self._norm_pieces(node, inputs[0])
        entries = [slice(piece.start, piece.stop) for piece in self._pieces[node.name]]
        return [self._corrected(node, x, task, own) for x, own in zip(pieces, entries, strict=True)]

    def _norm_pieces(self, node: Node, pieces: Sequence[Tensor]) -> list[Tensor]:
        norm, found = self.map_of(node), []
        for x, piece in zip(pieces, self._pieces[node.name], strict=True):
            own = slice(piece.start, piece.stop)
            affine = (norm.weight[own], norm.bias[own]) if norm.affine else (None, None)
            found.append(
                F.batch_norm(x, norm.running_mean[own], norm.running_var[own], *affine, False, 0.0, norm.eps)
            )
        return found

    def _joined(self, name: str, pieces: Sequence[Tensor]) -> Tensor:
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), self.trace.layouts[name].dim)

    def _apart(self, name: str, whole: Tensor) -> list[Tensor]:
        sizes = [piece.stop - piece.start for piece in self._pieces[name]]
        return list(whole.split(sizes, self.trace.layouts[name].dim))

    def plain(self, task: str | None = None, fold: bool = False) -> nn.Module:
        """An ordinary network of torch's own layers under the sources' names, which gives what ``net(x, task)`` gives.

        A torch.fx.GraphModule with copies of the weights, zeros where there is no block. fold: batch norms are
        folded into the linear maps that they alone read. Raises InputError for a task that is not there.
        """
        if not isinstance(fold, bool):
            raise InputError(f"fold: found {shown(fold)}; allowed: True, False")
        return make_plain(self, self._index(task), fold)

    def tune(self, example: Tensor) -> Tuning:
        """Run layers in blocks as one dense layer each, or the whole with its batch norms folded, in blocks or as an
        ordinary network, where that is measured to be faster on ``example``'s device.

        example: images (n, ...) as many as are usual. In memory only, where a folded network takes as much again:
        what it gives is the same within rounding, and what it saves is the same. Gradients are those of the blocks,
        which then run. Raises InputError for images of another shape.
        """
        return tune(self, example)

    def untune(self) -> None:
        """All blocks again."""
        self.instead = None
        for module in self.maps.values():
            if isinstance(module, BlockMap):
                module.at_once, module._made = False, None

    def report(self) -> "pd.DataFrame":
        """What became of each layer, and what it costs: a table (stages.core.merged.table)."""
        return layer_table(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that ``load_merged`` reads without the code of the source networks."""
        write_merged(self, path)


def _key(node: Node) -> str:
    return f"{node.name}_"  # a plain name may be one that nn.ModuleDict has itself, such as "values"
