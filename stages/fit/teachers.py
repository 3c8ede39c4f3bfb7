"""What unlabelled images say about a merged network: how far it is from the networks that know them.

For an image x of task m, with f the values at some node in merged units and l the logits,

    mean |f_M(x) - f_m(x)|^2 / var f_m                                    (each node that is looked at)
    + KL(softmax l_m(x) || softmax l_M(x))                                (m's own head, or the common one)
    + joint * CE([softmax l_m(x) on m's classes, 0 elsewhere], l_M(x))    (separate label spaces: all heads together)

The last term is what an ensemble has not: which task an unlabelled image belongs to. Images of a proxy belong to none;
their teacher is the ensemble of all networks, each for its own head where there are several, without the last term.
Distilling full weights from the owners is the baseline of FS-Merge (Kinderman et al. 2025); the KL term is Hinton et
al. 2015 at temperature 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.graph.nodes import Graph
from stages.core.graph.source import Source
from stages.core.graph.trace import Trace
from stages.core.merged.network import MergedNetwork
from stages.core.runtime import ranks

Values = Mapping[str, Tensor]


def watched_values(trace: Trace, features: str) -> list[str]:
    """Names of the values to imitate. last: what the head reads; stages: and the last map of each size.

    Those that do not have images first (frames of a film, sequences) are left out.
    """
    if features == "none":
        return []
    found = list(trace.graph.head.inputs) if trace.graph.head is not None else []
    if features == "stages":
        logits = trace.graph.logits
        maps = {trace.shapes[node.name][2:] for node in trace.graph.nodes if node.operation == "conv2d"}
        ends = {
            trace.shapes[node.name][2:]: node.name
            for node in trace.graph.nodes[1:]
            if node.name not in logits
            if len(trace.shapes[node.name]) == 4 and trace.layouts[node.name].dim == 1
            if trace.shapes[node.name][2:] in maps and trace.shapes[node.name][2:].numel() > 1
        }
        found = [*ends.values(), *(name for name in found if name not in ends.values())]
    return [name for name in found if trace.shapes[name][0] == 1]


def values_at(
    network: MergedNetwork | Source, graph: Graph, x: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Some of a network's values for a batch, the output among them; differentiable, in the network's own mode."""
    values, found, last = {graph.nodes[0].name: x}, {}, graph.last_uses()
    output = graph.scores
    for node in graph.nodes[1:]:
        values[node.name] = network.run_node(node, [values[name] for name in node.inputs])
        if node.name in names or node is output:
            found[node.name] = values[node.name]
        if node is output:
            break
        for name in last[node.name]:
            del values[name]
    return found


def step_entries(network: MergedNetwork) -> int:
    """How many numbers one image holds at most in a step forward and back."""
    graph = network.trace.graph
    values = [network.entries(node.name) for node in graph.nodes]
    read_again = sum(  # a block that reads some of its inputs keeps them
        network.entries(node.inputs[0]) * (len(network.map_of(node).blocks) - 1)
        for node in graph.nodes
        if node.linear
    )
    return sum(values) + read_again + 2 * max(values)


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about some images. values: those it imitates, in the entries it knows of; logits: by task,
    of its own head, or under the first task of the common one."""

    values: Values
    logits: Mapping[int, Tensor]


class _Known:
    """The merged entries of a value that some networks have a part in, ascending, and what each counts for there."""

    def __init__(
        self, network: MergedNetwork, alignment: Alignment, name: str, members: Sequence[int], like: Tensor
    ) -> None:
        parts = network.arrangement(name)
        self.width, self.positions = parts.width, [own.to(like.device) for own in parts.positions]
        self.shares = alignment.shares(network.trace.layouts[name], network.shared, like)
        total = like.new_zeros(parts.width)
        for m in members:
            total.index_add_(0, self.positions[m], self.shares[m])
        self.entries = total.nonzero().flatten()
        self.total = total[self.entries]


class Teacher:
    """Some of the sources, units in merged order: the owner of a task's images alone, or all for images of no task.

    names: the values to imitate. joint: weight of the third term, for a single owner of a head of its own.
    """

    def __init__(
        self,
        network: MergedNetwork,
        sources: Sequence[Source],
        alignment: Alignment,
        members: Sequence[int],
        names: Sequence[str],
        joint: float,
    ) -> None:
        self.network, self.sources, self.alignment = network, sources, alignment
        self.members, self.names = list(members), list(names)
        self.separate = network.labels == "separate"
        self.joint = joint if self.separate and len(self.members) == 1 else 0.0
        like = next(iter(sources[0].state.values()))
        self._known = {name: _Known(network, alignment, name, self.members, like) for name in self.names}
        self.output = network.trace.graph.scores.name
        self._classes = [own.to(like.device) for own in network.arrangement(self.output).positions]
        self.variance: dict[str, float] = dict.fromkeys(self.names, 1.0)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Lesson:
        """What the members say about a batch: their mean, weighted by their shares."""
        graph = self.network.trace.graph
        found = [values_at(self.sources[m], graph, x, self.names) for m in self.members]
        values = {name: self._together(name, [own[name] for own in found]) for name in self.names}
        logits = [_precise(own[self.output]) for own in found]
        if self.separate:
            return Lesson(values, dict(zip(self.members, logits, strict=True)))
        return Lesson(values, {self.members[0]: sum(logits) / len(logits)})

    def _together(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """One value of the members as one, in the known merged entries."""
        layout, known = self.network.trace.layouts[name], self._known[name]
        shape, every = list(values[0].shape), [1] * values[0].dim()
        shape[layout.dim], every[layout.dim] = known.width, -1
        result = values[0].new_zeros(shape)
        for m, value in zip(self.members, values, strict=True):
            view = self.alignment.view(value, layout, layout.dim, self.network.shared, m)
            part = view * known.shares[m].to(view).view(every)
            result.index_add_(layout.dim, known.positions[m], part)
        return result.index_select(layout.dim, known.entries) / known.total.to(result).view(every)

    @torch.no_grad()
    def measure(self, batches: Sequence[Tensor]) -> None:
        """Find the variance of what is imitated, over images and places, averaged over entries."""
        moments = {name: [0.0, 0.0, 0] for name in self.names}
        for x in batches:
            for name, value in self(x).values.items():
                dim = self.network.trace.layouts[name].dim
                rows = value.movedim(dim, -1).flatten(0, -2).double()
                own = moments[name]
                own[0], own[1], own[2] = (
                    own[0] + rows.sum(0),
                    own[1] + rows.square().sum(0),
                    own[2] + len(rows),
                )
        for name, (total, squares, seen) in moments.items():
            count = total.new_tensor(seen)
            ranks.add_up(total, squares, count)
            variance = float((squares / count - (total / count).square()).clamp(min=0).mean())
            self.variance[name] = variance if variance > 0 else 1.0  # of one image, or of dead units

    def losses(self, values: Values, lesson: Lesson) -> Tensor:
        """How far the merged network is from the lesson, image by image. values: the network's own. Returns (n,)."""
        at = self.network.trace.layouts[self.output].dim
        logits = _precise(values[self.output])
        found = logits.new_zeros(len(logits))
        for name, goal in lesson.values.items():
            dim = self.network.trace.layouts[name].dim
            own = values[name].index_select(dim, self._known[name].entries)
            found = found + (own - goal).flatten(1).to(found.dtype).square().mean(1) / self.variance[name]
        for task, goal in lesson.logits.items():
            own = logits.index_select(at, self._classes[task]) if self.separate else logits
            known = goal.log_softmax(at)
            off = (known.exp() * (known - own.log_softmax(at))).sum(at)
            if self.joint:
                among = logits.log_softmax(at).index_select(at, self._classes[task])
                off = off - self.joint * (known.exp() * among).sum(at)
            found = found + (
                off.flatten(1).mean(1) if off.dim() > 1 else off
            )  # over places with logits of their own
        return found


def _precise(logits: Tensor) -> Tensor:
    """float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
