"""Layers of a merged network that act on each unit, or on each part of the units, alone.

What is no dense linear map (merged.blocks) has one entry of its parameters per unit of the merged value. Norms
over all units are taken over each network's view, so that with everything separate every network is normalised as it
was alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stages.core.graph.nodes import COPIED, Node
from stages.core.graph.operations import OPERATIONS, unspread
from stages.core.graph.trace import Trace
from stages.core.merged.arrangement import Arrangement
from stages.core.merged.blocks import Block
from stages.core.merged.mixed import MixMap
from stages.core.runtime.errors import InputError


class MergedLayer(nn.Module):
    """A norm, a grouped convolution or a lone parameter: parameters by role, as wide as the merged value."""

    def __init__(self, node: Node, trace: Trace, arrangement: Arrangement) -> None:
        super().__init__()
        self.node, self.outputs = node, arrangement
        self.attributes = dict(node.attributes)
        if node.operation != "convolve_parameter":  # parameters are as they are seen
            self.attributes.pop("view", None)
        if node.attributes.get("groups", 1) > 1:  # as many channels in each as in a source
            self.attributes["groups"] *= arrangement.width
            self.attributes["groups"] //= trace.layouts[node.name].width
        for role, name in node.parameters.items():
            shape = list(trace.widened(node, role, torch.empty(()).expand(trace.parameters[name])).shape)
            shape[trace.unit_dim(node, role)] = arrangement.width
            if role.startswith("running"):  # statistics, which are not trained
                self.register_buffer(role, torch.zeros(shape))
            else:
                self.register_parameter(role, nn.Parameter(torch.zeros(shape)))
        self._fixed = _fixed_sizes(node, trace) if node.operation.endswith("_parameter") else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """inputs: whole merged values. Raises InputError where a parameter fixes another number of positions."""
        for dim, size in self._fixed.items():
            if inputs[0].shape[dim] != size:
                raise InputError(
                    f"{self.node.name}: found {inputs[0].shape[dim]} positions; allowed: {size}, as of inputs of the "
                    "size that the sources take"
                )
        own = {role: getattr(self, role) for role in self.node.parameters}
        return OPERATIONS[self.node.operation].run(inputs, own, self.attributes)


def _fixed_sizes(node: Node, trace: Trace) -> dict[int, int]:
    """Dimensions of a value, counted from the last, along which a parameter has an entry for each position."""
    shape, unit = trace.shapes[node.inputs[0]], trace.layouts[node.name].dim - len(trace.shapes[node.name])
    seen = node.attributes.get("view", trace.parameters[next(iter(node.parameters.values()))])
    dims = range(-min(len(seen), len(shape)), 0)
    # What a table contracts is not the value's rows.
    rows = -2 if node.operation == "matmul_parameter" else None
    return {d: shape[d] for d in dims if seen[d] == shape[d] > 1 and d not in (unit, rows)}


class Moved(nn.Module):
    """Units in other places: what a slice, a channel shuffle or padding of units does. Entries of no unit are zero."""

    def __init__(self, source: Sequence[int], dim: int, inputs: Arrangement, outputs: Arrangement) -> None:
        super().__init__()
        self.dim, index = dim, torch.full((outputs.width,), -1)
        came = torch.tensor(source)
        for read, written in zip(inputs.positions, outputs.positions, strict=True):
            index[written[came >= 0]] = read[came[came >= 0]]
        self.index_of = index
        self.register_buffer("index", index.clamp(min=0), persistent=False)
        self.register_buffer(
            "none", (index < 0).nonzero().flatten() if (index < 0).any() else None, persistent=False
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """inputs: whole merged values, side by side."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, self.dim)
        x = x.index_select(self.dim, self.index)
        return x if self.none is None else x.index_fill(self.dim, self.none, 0.0)


class GroupedMap(MergedLayer):
    """A grouped convolution: every part of the merged outputs reads its own part of the merged inputs.

    weight: (parts * rows, columns, kh, kw). It looks like a BlockMap of one block to those who train it.
    """

    def __init__(self, node: Node, trace: Trace, inputs: Arrangement, outputs: Arrangement) -> None:
        super().__init__(node, trace, outputs)
        self.inputs, self.groups = inputs, self.attributes["groups"]
        self.blocks = [Block(0, outputs.width, torch.arange(inputs.width // self.groups), None)]
        if "bias" not in node.parameters:
            self.bias = None

    @property
    def weights(self) -> list[nn.Parameter]:
        return [self.weight]


class Viewed(MergedLayer):
    """What looks at all units of a value: in a merged value at each network's view alone.

    What it finds for an entry is what it finds in its network's view; a shared entry is in all views and takes the
    mean of theirs. Where nothing is separate the views are one, and where nothing is shared they are the sources'.
    """

    def __init__(self, node: Node, trace: Trace, arrangement: Arrangement) -> None:
        super().__init__(node, trace, arrangement)
        self.count = len(arrangement.positions)
        whole = all(len(own) == arrangement.width for own in arrangement.positions)
        self.dim = trace.layouts[node.name].dim
        for m, own in enumerate(arrangement.positions):
            self.register_buffer(f"view{m}", None if whole else torch.sort(own).values, persistent=False)
        share = torch.full((self.count, arrangement.width), 1 / self.count)
        for m in range(self.count):
            share[:, arrangement.owner == m] = 0.0
            share[m, arrangement.owner == m] = 1.0
        self.register_buffer("share", share, persistent=False)

    def views(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each network's entries of a value, and what each entry takes of what is found there, as it broadcasts."""
        shape = [-1 if d == self.dim else 1 for d in range(x.dim())]
        for m in range(self.count):
            yield x.index_select(self.dim, getattr(self, f"view{m}")), self.share[m].view(shape)


class ViewReduction(Viewed):
    """A mean, sum, maximum, variance or length over units that is spread over them (stages.core.graph.spread)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.view0 is None:
            return super().forward(x)
        settings, found = unspread(self.attributes), 0.0
        for own, share in self.views(x):
            found = found + share * OPERATIONS[self.node.operation].run([own], {}, settings)
        return found


class ViewNorm(Viewed):
    """Layer norm, or group norm with one group, of a merged value: by the mean and variance of the views."""

    def forward(self, x: Tensor) -> Tensor:
        if self.view0 is None:
            return super().forward(x)
        dim, over = self.dim, reduced_dims(self.node, x.dim())
        if self.node.operation == "normalize":
            return self._unit_length(x)
        shape = [-1 if d == dim else 1 for d in range(x.dim())]
        mean = variance = 0.0
        for own, share in self.views(x):
            var, centre = torch.var_mean(own, over, correction=0, keepdim=True)
            mean, variance = mean + share * centre, variance + share * var
        x = (x - mean) * (variance + self.attributes["eps"]).rsqrt()
        if "weight" in self.node.parameters:
            x = x * (self.weight.view(shape) if self.weight.dim() == 1 else self.weight)
        if "bias" in self.node.parameters:
            x = x + (self.bias.view(shape) if self.bias.dim() == 1 else self.bias)
        return x

    def _unit_length(self, x: Tensor) -> Tensor:
        length = 0.0
        for own, share in self.views(x):
            length = length + share * own.norm(dim=self.dim, keepdim=True).clamp(min=self.attributes["eps"])
        return x / length


NORMS = ("layer_norm", "group_norm", "normalize")


def reduced_dims(node: Node, rank: int) -> list[int]:
    """The dimensions whose entries a norm looks at together."""
    if node.operation == "group_norm":
        return list(range(1, rank))
    if node.operation == "normalize":
        return [node.attributes["dim"] % rank]
    return list(range(rank - node.attributes.get("rank", 1), rank))


def over_units(node: Node, trace: Trace) -> bool:
    """Whether a node looks at all units of a value, as a norm does, which each network's view then has for itself."""
    if "spread" in node.attributes:
        return True
    if node.operation not in NORMS or node.attributes.get("groups", 1) > 1:
        return False
    return trace.layouts[node.name].dim in reduced_dims(node, len(trace.shapes[node.name]))


def merged_layer(node: Node, trace: Trace, inputs: Arrangement, outputs: Arrangement) -> nn.Module | None:
    """The module of a node that is neither a dense linear map nor a batch norm; None where there is nothing to keep."""
    if node.operation in COPIED:
        return MixMap(node, trace, outputs)
    if node.grouped:
        return GroupedMap(node, trace, inputs, outputs)
    if over_units(node, trace):
        return (ViewReduction if "spread" in node.attributes else ViewNorm)(node, trace, outputs)
    if node.parameters or node.operation in NORMS:
        return MergedLayer(node, trace, outputs)
    return None
