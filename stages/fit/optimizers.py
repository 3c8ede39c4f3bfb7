"""What refining steps with.

muon: Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"), as torch has it, for the
weights of linear maps and convolutions: their momentum is brought to the nearest matrix of orthonormal rows or columns.
AdamW (Loshchilov and Hutter 2019) for heads and whatever is no such matrix. adamw: AdamW for all.
"""

import torch
from torch import Tensor, nn

from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Refine
from stages.core.runtime.schedule import parameter_groups

ADAM_SHARE = 0.3  # of Muon's rate: what AdamW steps with beside it


class Optimizers:
    """Steps of all parameters of a merged network, by the gradients they have."""

    def __init__(self, network: MergedNetwork, settings: Refine) -> None:
        matrices = hidden_weights(network) if settings.optimizer == "muon" else []
        self._matrices = [
            (weight, nn.Parameter(_lined_up(weight.detach(), weight).view(len(weight), -1)))
            for weight in matrices
        ]
        taken, rest = {id(weight) for weight in matrices}, parameter_groups(network, settings.weight_decay)
        for group in rest:
            group["params"] = [own for own in group["params"] if id(own) not in taken]
        rate, self._all = settings.learning_rate, []
        if matrices:
            self._all.append(
                torch.optim.Muon(
                    [matrix for _, matrix in self._matrices],
                    lr=rate,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest := [group for group in rest if group["params"]]:
            self._all.append(torch.optim.AdamW(rest, lr=rate * (ADAM_SHARE if matrices else 1)))
        self._rates = [[group["lr"] for group in own.param_groups] for own in self._all]
        self._network = network

    def zero_grad(self) -> None:
        self._network.zero_grad()

    def step(self, share: float) -> None:
        """share: of the learning rates."""
        for weight, matrix in self._matrices:
            matrix.grad = (
                None if weight.grad is None else _lined_up(weight.grad, weight).reshape(len(weight), -1)
            )
        for own, rates in zip(self._all, self._rates, strict=True):
            for group, rate in zip(own.param_groups, rates, strict=True):
                group["lr"] = rate * share
            own.step()


def hidden_weights(network: MergedNetwork) -> list[nn.Parameter]:
    """The weights of linear maps and convolutions that read every input, block by block, but not the heads'."""
    nodes = [node for node in network.trace.graph.nodes if node.linear and node is not network.head]
    return [weight for node in nodes for weight in network.map_of(node).weights if weight.numel()]


def _lined_up(value: Tensor, like: Tensor) -> Tensor:
    """A weight or its gradient with its dimensions in the order in which ``like`` lies in memory, rows first.

    So the weight is a matrix without a copy; Muon's step does not depend on the order of the columns.
    """
    return value.permute(0, *sorted(range(1, like.dim()), key=lambda dim: -like.stride(dim)))
