"""A merged network as an ordinary network: torch's own layers under the sources' module paths, zeros between blocks.

The result is a torch.fx.GraphModule whose code calls torch alone.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stages.core.graph.apart import convolve
from stages.core.graph.folding import exclusive_norms
from stages.core.graph.nodes import Node, oriented
from stages.core.graph.operations import OPERATIONS, unspread
from stages.core.merged.arrangement import pieces_of
from stages.core.merged.blocks import BlockMap
from stages.core.merged.mixed import MixMap
from stages.core.merged.plain_layers import as_source, layer_of, picked
from stages.core.merged.plain_places import Places
from stages.core.merged.plain_views import repeated, viewed
from stages.core.merged.unit_layers import Moved, Viewed


@torch.no_grad()
def make_plain(network: nn.Module, task: int | None, fold: bool) -> torch.fx.GraphModule:
    """The merged network ``network``, or one task's own head of it. fold: batch norms into the layers before them.

    Where several nodes use one tensor of the source (a layer that is called twice) and their merged tensors differ,
    the second and later ones get a name of their own: ``<name>_1``. Raises InputError for a module path that torch.fx
    keeps for itself.
    """
    writer = _Writer(network, fold)
    x = writer.proxy(writer.graph.placeholder("x"))
    output = writer.whole(x, task)
    writer.graph.output(output.node)
    writer.graph.lint()
    plain = torch.fx.GraphModule(writer.places.root, writer.graph, "Plain")
    return plain.train(network.training)


def foldable_norms(network: nn.Module) -> dict[str, Node]:
    """{linear map of a merged network: the batch norm that alone reads it}, where nothing but the norm corrects it."""
    outside = {*network.corrected, *network.trace.graph.logits}
    outside |= {node.name for node in network.trace.graph.nodes if not node.linear}
    return {n: norm for n, norm in exclusive_norms(network.trace.graph).items() if n not in outside}


def with_norm(
    norm: nn.Module, weight: Tensor, bias: Tensor | None, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """The weight (rows, ...) and bias of a linear map with the batch norm behind it. rows: of the norm."""
    affine = (norm.weight[rows], norm.bias[rows]) if norm.affine else (None, None)
    statistics = norm.running_mean[rows], norm.running_var[rows]
    return fuse_conv_bn_weights(weight, bias, *statistics, norm.eps, *affine)


class _Writer:
    """Writes a merged network's nodes as calls of torch.fx, with the tensors and layers that they need."""

    def __init__(self, network: nn.Module, fold: bool) -> None:
        self.net, self.trace = network, network.trace
        self.places, self.graph = Places(), torch.fx.Graph()
        self.tracer = torch.fx.proxy.GraphAppendingTracer(self.graph)
        self.norms = foldable_norms(network) if fold else {}
        self.gone = {norm.name for norm in self.norms.values()}

    def proxy(self, node: torch.fx.Node) -> Proxy:
        return Proxy(node, self.tracer)

    def whole(self, x: Proxy, task: int | None) -> Proxy:
        """The output, as ``MergedNetwork.forward`` has it."""
        if task is None and self.net.corrected:
            return torch.cat([self.whole(x, m) for m in range(self.net.networks)], 1)
        logits = self.trace.graph.logits if self.net.labels == "separate" else set()
        first = self.trace.graph.nodes[0]
        values = {first.name: x * 1.0 if first.attributes.get("counts") else x}  # whole numbers as floats
        for node in self.trace.graph.nodes[1:]:
            if node.name in logits:
                return self._heads(values[self.net.head.inputs[0]], task)
            values[node.name] = self.node(node, [values[name] for name in node.inputs], task)
        return values[self.trace.graph.output.name]

    def _heads(self, x: Proxy, task: int | None) -> Proxy:
        tail, head = self.trace.graph.tail, self.net.head
        alone = task is not None and not self.net.corrected and not any(node.parameters for node in tail)
        if alone:
            value = self.linear(head, x, self.net.arrangement(head.name).positions[task])
            pieces = [value]
        else:
            pieces = self._cut(head, self.linear(head, x))
        own = [len(positions) for positions in self.net.arrangement(head.name).positions]
        widths = [own[task]] if alone else own
        dim = self.trace.layouts[head.name].dim
        for node in tail:
            if self.net.has_map(node):
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
                pieces = self._cut(node, self.node(node, [whole], None))
            elif node.operation == "rearrange":
                pieces = [self._rearrange(node, p, n) for p, n in zip(pieces, widths, strict=True)]
            else:
                pieces = [self.node(node, [piece], None) for piece in pieces]
            dim = self.trace.layouts[node.name].dim
        if task is not None:
            return pieces[0 if alone else task]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _cut(self, node: Node, whole: Proxy) -> list[Proxy]:
        own, dim = pieces_of(self.net.arrangement(node.name)), self.trace.layouts[node.name].dim
        return [whole.narrow(dim, p.start, p.stop - p.start) for p in own] if len(own) > 1 else [whole]

    def node(self, node: Node, inputs: Sequence[Proxy], task: int | None) -> Proxy:
        """One operation, with its correction for a task."""
        value = inputs[0] if node.name in self.gone else self._operation(node, list(inputs))
        if task is None or node.name not in self.net.corrected:
            return value
        own = getattr(self.net, f"correction_{node.name}")[:, task]
        dim = self.trace.layouts[node.name].dim
        scale, shift = own.view(2, *[-1 if d == dim else 1 for d in range(len(self.trace.shapes[node.name]))])
        names = f"corrections.{node.name}.scale{task}", f"corrections.{node.name}.shift{task}"
        return value * self._tensor(names[0], scale, False) + self._tensor(names[1], shift, False)

    def _operation(self, node: Node, inputs: list[Proxy]) -> Proxy:
        if not self.net.has_map(node):
            for i, name in enumerate(node.inputs):
                key = f"{node.name}_{i}"
                if key in self.net.maps:
                    inputs[i] = self._moved(self.net.maps[key], inputs[i], len(self.trace.shapes[name]))
            return self._call(node, inputs, {}, node.attributes)
        module = self.net.map_of(node)
        if isinstance(module, BlockMap):
            return self.linear(node, inputs[0])
        if isinstance(module, Moved):
            whole = inputs[0] if len(inputs) == 1 else torch.cat(inputs, module.dim)
            return self._moved(module, whole, len(self.trace.shapes[node.inputs[0]]))
        if node.operation == "batch_norm":
            return self._layer(node, copy.deepcopy(module), "running_mean", inputs[0])
        if isinstance(module, MixMap):
            return self._mixed(node, module, inputs[0])
        if isinstance(module, Viewed) and module.view0 is not None:
            return self._viewed(node, module, inputs[0])
        layer = layer_of(node, module.attributes, dict(module.named_parameters()), self._tails(node))
        if layer is not None and self._owns(node):
            x = inputs[0].long() if node.operation == "embedding" else inputs[0]
            return self._layer(node, layer, "weight", x)
        attributes = {key: value for key, value in module.attributes.items() if key != "view"}
        return self._call(node, inputs, self._parameters(node, module), attributes)

    # -- parameters and layers --------------------------------------------------------------------------------------

    def linear(self, node: Node, x: Proxy, rows: Tensor | None = None) -> Proxy:
        """A linear map as one dense layer; ``rows``: of these outputs alone."""
        module = self.net.map_of(node)
        weight = module.dense_weight()
        bias = None if module.bias is None else module.bias.detach().clone()
        if node.name in self.norms:
            weight, bias = with_norm(self.net.map_of(self.norms[node.name]), weight, bias)
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        own = {"weight": oriented(node, weight).contiguous(), **({} if bias is None else {"bias": bias})}
        if self._owns(node):
            return self._layer(node, layer_of(node, node.attributes, own, ()), "weight", x)
        roles = {"bias": f"{node.parameters['weight']}_bias", **node.parameters}
        found = {role: self._tensor(roles[role], tensor) for role, tensor in own.items()}
        return self._call(node, [x], found, node.attributes)

    def _owns(self, node: Node) -> bool:
        """Whether a node's tensors in the source are called as those of one of torch's layers."""
        paths = {name.rpartition(".")[0] for name in node.parameters.values()}
        named = all(name == f"{name.rpartition('.')[0]}.{role}" for role, name in node.parameters.items())
        return len(paths) == 1 and named and "" not in paths

    def _tails(self, node: Node) -> tuple[int, ...]:
        """The sizes that a layer norm reduces, of the merged value."""
        return self._shape(node.name)[-node.attributes.get("rank", 1) :] if "eps" in node.attributes else ()

    def _shape(self, value: str) -> tuple[int, ...]:
        shape = list(self.trace.shapes[value])
        shape[self.trace.layouts[value].dim] = self.net.arrangement(value).width
        return tuple(shape)

    def _layer(self, node: Node, layer: nn.Module, role: str, x: Proxy) -> Proxy:
        path = self.places.put(node.parameters[role].rpartition(".")[0], layer)
        return self.proxy(self.graph.call_module(path, (x.node,)))

    def _parameters(self, node: Node, module: nn.Module) -> dict[str, Proxy]:
        found = {}
        for role, name in node.parameters.items():
            tensor = getattr(module, role)
            own = as_source(tensor.detach(), self.trace.parameters[name])
            value = self._tensor(name, own, isinstance(tensor, nn.Parameter))
            found[role] = (
                value.reshape(tuple(tensor.shape))
                if own.numel() == tensor.numel() > 1 and (own.shape != tensor.shape)
                else value
            )
            if own.numel() < tensor.numel():  # one for all units
                found[role] = value.reshape([1] * tensor.dim())
                if node.operation == "prelu":
                    found[role] = value
        return found

    def _tensor(self, name: str, tensor: Tensor, trained: bool = True) -> Proxy:
        value = tensor.detach().clone()
        whole = nn.Parameter(value) if trained and value.is_floating_point() else value
        return self.proxy(self.graph.get_attr(self.places.put(name, whole)))

    # -- operations -------------------------------------------------------------------------------------------------

    def _call(self, node: Node, x: list[Proxy], p: Mapping[str, Proxy], a: Mapping[str, Any]) -> Proxy:
        """What the table's operation does, in calls that look at no sizes but those known now."""
        rank = len(self.trace.shapes[node.inputs[0]])
        if "spread" in a:
            found = OPERATIONS[node.operation].run(x, p, unspread(a))
            return repeated(found, a["spread"], rank, self._shape(node.name)[a["spread"]])
        if node.operation == "rearrange":
            return self._rearrange(node, x[0])
        if node.operation == "convolve_parameter":
            return convolve(x[0], p["value"], node.attributes, *self._shape(node.inputs[0])[1:3])
        if node.operation == "pick":
            return picked(x[0], a["dim"] % rank, a["index"])
        if node.operation == "slice":
            at = (slice(None),) * (a["dim"] % rank) + (slice(a["start"], a["stop"], a["step"]),)
            return x[0][at]
        if node.operation == "select":
            return x[0].select(a["dim"], a["index"])
        if node.operation == "pad":
            return F.pad(x[0], a["pad"], a.get("mode", "constant"), a.get("value"))
        if node.operation == "layer_norm":
            y = F.layer_norm(x[0], self._tails(node), None, None, a["eps"])
            y = y * p["weight"] if "weight" in p else y
            return y + p["bias"] if "bias" in p else y
        if node.operation == "concatenate_parameter":
            dim = a["dim"] % rank
            own = self.trace.parameters[node.parameters["value"]]
            own = [1] * (rank - len(own)) + list(own)  # 1: images, wherever they are, and what is beside
            sizes = [x[0].shape[d] if n == 1 and d != dim else -1 for d, n in enumerate(own)]
            both = [p["value"].expand(sizes), x[0]]
            return torch.cat(both if a["first"] else both[::-1], dim)
        return OPERATIONS[node.operation].run(x, p, a)

    def _rearrange(self, node: Node, x: Proxy, width: int | None = None) -> Proxy:
        """width: of what is read, where it is a part of the value."""
        a, dim = node.attributes, self.trace.layouts[node.inputs[0]].dim
        shape = list(self._shape(node.inputs[0]))
        shape[dim] = width or shape[dim]
        sizes: list[int | Proxy] = []
        inferred = None  # the one entry that reshapes find themselves
        for d, (atoms, free) in enumerate(zip(a["atoms"], a["free"], strict=True)):
            own = list(atoms)
            if free is not None:
                others = math.prod(own[:free] + own[free + 1 :])
                if d == dim:
                    own[free] = shape[d] // others
                elif inferred is None:
                    own[free], inferred = -1, len(sizes) + free
                else:
                    own[free] = x.size(d) // others
            sizes += own
        final, at = [], 0
        for count in a["groups"]:
            own = a["order"][at : at + count]
            final.append(-1 if inferred in own else math.prod([sizes[i] for i in own]))
            at += count
        return x.reshape(sizes).permute(list(a["order"])).reshape(final)

    def _moved(self, module: Moved, x: Proxy, rank: int) -> Proxy:
        index = module.index_of
        if bool((index < 0).any()):  # one more entry, of zeros
            width = int(index.max()) + 1
            x = x.narrow(module.dim, 0, width)
            x = F.pad(x, [0, 0] * (rank - 1 - module.dim) + [0, 1])
            index = torch.where(index < 0, width, index)
        return picked(x, module.dim, index.tolist())

    def _mixed(self, node: Node, module: MixMap, x: Proxy) -> Proxy:
        """The units of each owner by its copy."""
        parts = []
        for piece in module.pieces:
            own = (
                x if len(module.pieces) == 1 else x.narrow(module.dim, piece.start, piece.stop - piece.start)
            )
            found = {
                role: self._tensor(node.parameters[role], tensor)
                for role, tensor in module.copy(piece.owner).items()
            }
            parts.append(OPERATIONS[node.operation].run([own], found, module.attributes))
        return parts[0] if len(parts) == 1 else torch.cat(parts, module.dim)

    def _viewed(self, node: Node, module: Viewed, x: Proxy) -> Proxy:
        rank = len(self.trace.shapes[node.name])
        y = viewed(node, module, x, rank, self.net.arrangement(node.name))
        found = self._parameters(node, module)
        for role, join in (("weight", torch.mul), ("bias", torch.add)):
            if role in found:
                flat = module.get_parameter(role).dim() == 1
                shape = [-1 if d == module.dim else 1 for d in range(rank)]
                y = join(y, found[role].reshape(shape) if flat else found[role])
        return y
