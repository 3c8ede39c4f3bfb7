"""The merged network: built from its real blocks, run, counted, saved and loaded.

How the units lie in its values, and which blocks exist, is in stages.core.merged.blocks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.graph.nodes import Node, graph_to_json
from stages.core.graph.operations import run_node
from stages.core.graph.source import Task
from stages.core.graph.trace import Trace
from stages.core.merged.arrangement import Arrangement, arrange, arrange_heads, held_pieces
from stages.core.merged.blocks import BlockMap
from stages.core.merged.unit_layers import MergedLayer, merged_layer
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_tensors

FORMAT = "merged-network-1"


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
        self._arrangements: dict[str, Arrangement] = {}
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
                ends = self.arrangement(node.inputs[0]), self.arrangement(node.name)
                self.maps[_key(node)] = BlockMap(node, *ends, kernel, "bias" in node.parameters)
            elif node.operation == "batch_norm":
                norm = nn.BatchNorm2d if len(trace.shapes[node.name]) == 4 else nn.BatchNorm1d
                affine = "weight" in node.parameters
                width = self.arrangement(node.name).width
                self.maps[_key(node)] = norm(width, eps=node.attributes["eps"], affine=affine)
            elif node.inputs:
                layer = merged_layer(
                    node, trace, self.arrangement(node.inputs[0]), self.arrangement(node.name)
                )
                if layer is not None:
                    self.maps[_key(node)] = layer
        self._pieces = {name: held_pieces(self.arrangement(name)) for name in trace.layouts}
        self.eval()

    @property
    def networks(self) -> int:
        return len(self.tasks)

    @property
    def head(self) -> Node | None:
        """The output node when it is a Linear: the head(s)."""
        output = self.trace.graph.output
        return output if output.operation == "linear" else None

    def arrangement(self, value: str) -> Arrangement:
        """How the sources' entries lie in the named value."""
        if value not in self._arrangements:
            self._arrangements[value] = self._arrange(value)
        return self._arrangements[value]

    def _arrange(self, value: str) -> Arrangement:
        if self.labels == "separate" and value == self.trace.graph.output.name:
            return arrange_heads([len(task.classes) for task in self.tasks])
        return arrange(self.trace.layouts[value], self.shared, self.networks)

    def entries(self, value: str) -> int:
        """How many numbers the named value of one image holds."""
        own = self.trace.shapes[value].numel()
        return own // self.trace.layouts[value].width * self.arrangement(value).width

    def run_node(self, node: Node, inputs: Sequence[Tensor], task: int | None = None) -> Tensor:
        """One operation of the merged network. task: whose correction is applied, where there is one."""
        if _key(node) not in self.maps:
            return run_node(node, inputs, {})
        return self._corrected(node, self.maps[_key(node)](inputs[0]), task, slice(None))

    def set_correction(self, node: Node, correction: Tensor) -> None:
        """Scale and shift what a node gives, for each task its own way. correction: (2, T, merged width)."""
        self.register_buffer(f"correction_{node.name}", correction)

    @property
    def corrected(self) -> list[str]:
        """Names of the nodes whose values are corrected for each task."""
        return [n.name for n in self.trace.graph.nodes if f"correction_{n.name}" in self._buffers]

    def _corrected(self, node: Node, value: Tensor, task: int | None, entries: slice) -> Tensor:
        correction = self._buffers.get(f"correction_{node.name}")
        if correction is None or task is None:
            return value
        dim = self.trace.layouts[node.name].dim
        scale, shift = correction[:, task, entries].view(
            2, *[-1 if d == dim else 1 for d in range(value.dim())]
        )
        return value * scale + shift

    def map_of(self, node: Node) -> nn.Module:
        """The BlockMap of a linear node, the batch norm of a batch_norm node, the MergedLayer of others."""
        return self.maps[_key(node)]

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """x: (n, ...) preprocessed images. Returns (n, classes)."""
        index, output = self._index(task), self.trace.graph.output
        if (
            index is None and self.corrected
        ):  # separate heads side by side, each with its own task's corrections
            return torch.cat([self(x, task=own.name) for own in self.tasks], 1)
        values = self._run(x, output, index)
        if index is None or self.labels == "shared":
            pieces = self._on_pieces(output, [values[name] for name in output.inputs], index)
            return self._joined(output.name, pieces)
        return self.map_of(output).on_pieces(values[output.inputs[0]], index)[0]

    def features(self, x: Tensor, task: str | None = None) -> Tensor:
        """What the head reads: (n, merged features)."""
        if self.head is None:
            raise InputError(
                f"the network ends in {self.trace.graph.output.operation}; allowed: a Linear head"
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
            raise InputError(f"task: found {task!r}; allowed: none, the tasks share one label space")
        if task not in names:
            raise InputError(f"task: found {task!r}; allowed: {', '.join(names)}")
        return names.index(task)

    def _run(self, x: Tensor, stop: Node, task: int | None) -> dict[str, list[Tensor]]:
        """Run up to, not including, ``stop``; the values that are still needed, in the pieces they are held in."""
        values = {self.trace.graph.nodes[0].name: [x]}
        for node in self.trace.graph.nodes[1:]:
            if node is stop:
                break
            values[node.name] = self._on_pieces(node, [values[name] for name in node.inputs], task)
            for name in self._last[node.name]:
                del values[name]
        return values

    def _on_pieces(self, node: Node, inputs: Sequence[list[Tensor]], task: int | None) -> list[Tensor]:
        if (
            node.operation in ("concatenate", "attention")
            or (node.parameters and not node.linear and self.training)
            or (_key(node) in self.maps and isinstance(self.map_of(node), MergedLayer))
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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that ``load_merged`` reads without the code of the source networks."""
        header = {
            "format": FORMAT,
            "graph": graph_to_json(self.trace.graph),
            "example": list(self.trace.shapes[self.trace.graph.nodes[0].name]),
            "shapes": self.trace.parameters,
            "tasks": [asdict(task) for task in self.tasks],
            "labels": self.labels,
            "shared": self.shared,
            "corrected": self.corrected,
            "about": self.about,
        }
        units = {f"units/{name}": value for name, value in self.units.items()}
        write_tensors(path, {**self.state_dict(), **units}, {"merged": json.dumps(header, sort_keys=True)})


def _key(node: Node) -> str:
    return f"{node.name}_"  # a plain name may be one that nn.ModuleDict has itself, such as "values"
