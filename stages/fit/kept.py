"""Copies of the sources in a merged network that is trained: their weights and their normalisation stay."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.graph.nodes import Node
from stages.core.merged.blocks import BlockMap
from stages.core.merged.mixed import MixMap
from stages.core.merged.network import MergedNetwork


class KeptEntries:
    """Within this context batch norms in training mode normalise copies by their own statistics, as ever; ``restore``
    puts the copies' parameters and statistics back after a step.

    exact: bool (merged width,) by node name (stages.core.merged.copies).
    """

    def __init__(self, network: MergedNetwork, exact: Mapping[str, Tensor]) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._copies: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.everything = True
        self._norms: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []  # with entries, means and variances
        for node in network.trace.graph.nodes:
            if node.operation == "batch_norm" and exact[node.name].any():
                norm = network.map_of(node)
                kept = exact[node.name].to(norm.running_mean.device)
                self._norms.append((norm, kept, norm.running_mean.clone(), norm.running_var.clone()))
            for parameter, dim, rows in _parameters(network, node):
                kept = _kept(network, node, exact[node.name])[rows].to(parameter.device)
                self.everything &= bool(kept.all())
                if kept.any():
                    mask = kept.view([-1 if d == dim else 1 for d in range(parameter.dim())])
                    self._copies.append((parameter, mask, parameter.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies' parameters and statistics back to the last bit."""
        for parameter, mask, value in self._copies:
            parameter.copy_(torch.where(mask, value, parameter))
        for norm, kept, mean, variance in self._norms:
            norm.running_mean.copy_(torch.where(kept, mean, norm.running_mean))
            norm.running_var.copy_(torch.where(kept, variance, norm.running_var))

    def __enter__(self) -> "KeptEntries":
        for norm, *own in self._norms:
            self._handles.append(norm.register_forward_hook(_own_statistics(*own)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _kept(network: MergedNetwork, node: Node, exact: Tensor) -> Tensor:
    """Which entries of a node's parameters are copies, given those of what it gives."""
    module = network.map_of(node)
    return module.kept(exact) if isinstance(module, MixMap) else exact


def _parameters(network: MergedNetwork, node: Node) -> Iterator[tuple[nn.Parameter, int, slice]]:
    """A node's parameters, the dimension of each that lies on the outputs, and which outputs they are."""
    if not network.has_map(node):
        return
    module = network.map_of(node)
    if isinstance(module, BlockMap):
        for block, weight in zip(module.blocks, module.weights, strict=True):
            yield weight, 0, slice(block.start, block.stop)
        if module.bias is not None:
            yield module.bias, 0, slice(None)
        return
    for role, parameter in module.named_parameters(recurse=False):
        if isinstance(module, MixMap):
            yield parameter, 0, slice(None)
            continue
        norm = node.operation == "batch_norm"
        yield parameter, 0 if norm else network.trace.unit_dim(node, role), slice(None)


def _own_statistics(kept: Tensor, mean: Tensor, variance: Tensor) -> Callable[..., Tensor | None]:
    def hook(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not norm.training:
            return None
        own = F.batch_norm(inputs[0], mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        return torch.where(kept.view(1, -1, *[1] * (output.dim() - 2)), own, output)

    return hook
