"""RegMean (Jin et al. 2023): W = (sum_t G_t)^-1 sum_t G_t W_t^T, layer by layer.

G_t is the Gram matrix of network t's inputs on its own task's images, W_t its weights; off-diagonal entries are
scaled, which keeps the solution near the sources. What is not a linear map, biases included, is averaged. After an
alignment, both are those of the network as seen through it; with separate units, of all the inputs a block reads.
"""

import torch
from torch import Tensor

from stages.core.align.alignment import view_states
from stages.core.graph.nodes import Node
from stages.core.merged.blocks import Block
from stages.core.sweep.gram import add_gram, complete_gram, restricted
from stages.core.sweep.rows import tap_columns
from stages.core.sweep.sweep import Sweep
from stages.fit.average import average_block
from stages.fit.equations.normal import solve_symmetric
from stages.fit.memory import map_sizes, regmean_bytes
from stages.fit.visitor import Fitter, LayerFit, layer_of


class RegMean(Fitter):
    """The visitor that gives ``network`` the regression mean of the sources."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.fit = self.fit.model_copy(update={"inputs": "source", "targets": "own"})
        self.states = view_states(self.sources, self.alignment, self.network.shared)

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        if not node.linear:
            return 0
        return regmean_bytes(self, node, batch)

    def visit(self, node: Node, sweep: Sweep) -> None:
        if not node.linear:
            return
        module = self.network.map_of(node)
        merged = module.outputs.owner < 0  # separate units keep their network's weights
        if not merged.any():
            return
        grams, left, energy = self._grams(node, sweep), 0.0, 0.0
        for block, weight in zip(module.blocks, module.weights, strict=True):
            rows = merged[block.start : block.stop].nonzero().flatten().to(weight.device)
            if len(rows):
                columns = tap_columns(block.columns.to(weight.device), weight.shape[2:].numel())
                W, own_left, own_energy = regression_mean(
                    [restricted(G, columns) for G in grams],
                    [own[rows].flatten(1).double() for own in self._networks(node, block)],
                    self.ridge,
                    node.name,
                )
                weight[rows] = W.to(weight.dtype).view_as(weight[rows])
                left, energy = left + own_left, energy + own_energy
        self.record.append(LayerFit(layer_of(node), left / energy if energy > 0 else 0.0))

    def targets(self, node: Node, sweep: Sweep, index: int) -> Tensor:
        """Nothing is fitted to them: any network's outputs show where the rows are."""
        return sweep.source(0, node.name, index)

    def _grams(self, node: Node, sweep: Sweep) -> list[Tensor]:
        """G_t of every task, off-diagonal entries scaled: (d_in, d_in) each."""
        module = self.network.map_of(node)
        d_in, _ = map_sizes(module)
        grams = [module.weights[0].new_zeros(d_in, d_in, dtype=torch.float64) for _ in self.sources]
        for index, batch in enumerate(sweep.batches):
            G, weight = grams[batch.task], sweep.weights[batch.task]
            self.each_rows(node, sweep, index, lambda rows, _, G=G, weight=weight: add_gram(G, rows, weight))
        for G in grams:
            complete_gram(G)
            diagonal = G.diagonal().clone()
            G.mul_(self.fit.off_diagonal).diagonal().copy_(diagonal)
        return grams

    def _networks(self, node: Node, block: Block) -> list[Tensor]:
        """W_t of a block: what each network alone would put there, zero where it has nothing."""
        module, name = self.network.map_of(node), node.parameters["weight"]
        own = [state[name] for state in self.states]
        whole = [weight.new_ones(len(weight)) for weight in own]
        return [
            average_block(
                [weight if n == m else torch.zeros_like(weight) for n, weight in enumerate(own)],
                block,
                module.inputs,
                module.outputs,
                whole,
            )
            for m in range(len(own))
        ]


def regression_mean(
    grams: list[Tensor], weights: list[Tensor], ridge: float, name: str = ""
) -> tuple[Tensor, float, float]:
    """The W (d_out, d_in) that minimises sum_t tr (W - W_t) G_t (W - W_t)^T; that sum, and sum_t tr W_t G_t W_t^T.

    grams: (d_in, d_in) each, weights: (d_out, d_in) each, float64. ridge: of the mean diagonal, towards the mean of
    the weights, so that what no image tells stays there.
    """
    G = sum(grams)
    mean = sum(weights) / len(weights)
    right = sum(own @ (W - mean).T for own, W in zip(grams, weights, strict=True))
    penalty = ridge * float(G.diagonal().mean())
    eps = torch.finfo(torch.float32).eps
    merged = mean + solve_symmetric(G, penalty, right, name, eps).T
    left = sum(
        float((((merged - W) @ own) * (merged - W)).sum()) for own, W in zip(grams, weights, strict=True)
    )
    energy = sum(float(((W @ own) * W).sum()) for own, W in zip(grams, weights, strict=True))
    return merged, left, energy
