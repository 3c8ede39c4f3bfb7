"""Layer-wise fitting inside a sweep: PLeaS, RegMean and progressive as settings of one least-squares problem.

At every Linear and Conv2d the merged layer is fitted on all images, installed, and the sweep goes on, so that a
later layer sees what the earlier ones really give (``inputs: merged``) or what the sources give (``inputs: source``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.graph.folding import exclusive_norms, norm_scale
from stages.core.graph.nodes import Node
from stages.core.graph.source import Source
from stages.core.merged.blocks import Block
from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Fit
from stages.core.sweep.norms import install_statistics, merged_moments, moments_bytes
from stages.core.sweep.rows import input_rows, kernel_of, output_rows, tap_columns, weight_matrix
from stages.core.sweep.sweep import Sweep
from stages.fit.adam import fit_adam
from stages.fit.average import average_block, entry_shares
from stages.fit.grouped import fit_grouped
from stages.fit.memory import few_rows, images_by_row, map_sizes, visit_bytes
from stages.fit.normal import NormalEquations, Solution
from stages.fit.rows import RowEquations


@dataclass
class LayerFit:
    """One line of the record: relative residual energy of a layer's fit."""

    layer: str
    residual: float


class Fitter:
    """The visitor that fits ``network`` to the ``sources``, units in merged order, seen through ``alignment``.

    ridge: relative to the mean diagonal of G. positions: share of a feature map's positions that is used, drawn
    with ``generator``. owned: whether every image has a task. After the sweep
    ``record`` has one entry per fitted layer.
    """

    def __init__(
        self,
        network: MergedNetwork,
        sources: Sequence[Source],
        fit: Fit,
        ridge: float,
        positions: float = 1.0,
        generator: torch.Generator | None = None,
        alignment: Alignment | None = None,
        owned: bool = True,
    ) -> None:
        self.owned = owned
        self.alignment = alignment or Alignment(len(sources))
        self.network, self.sources, self.fit = network, sources, fit
        self.ridge, self.positions = ridge, positions
        self.generator = generator or torch.Generator().manual_seed(0)
        self.record: list[LayerFit] = []
        self.exact = exact_entries(network)
        self.norms = exclusive_norms(network.trace.graph)
        layouts = network.trace.layouts
        self.scaled = {
            name: norm
            for name, norm in self.norms.items()
            if self.alignment.touches(layouts[name]) and "weight" in norm.parameters
        }
        self.folded = {  # linear nodes that are fitted to what the batch norm behind them gives
            name: norm
            for name, norm in self.norms.items()
            if fit.norm == "fold" and "weight" in norm.parameters
        }
        self.offsets: dict[str, Tensor] = {}  # folded batch norm -> target minus normalised output

    # -- what the sweep asks ------------------------------------------------------------------------------------

    def wants(self, node: Node) -> bool:
        return node.fitted or (node.operation == "batch_norm" and self.fit.inputs == "merged")

    def extra_bytes(self, node: Node, images: int, batch: int) -> int:
        if not node.fitted:
            return moments_bytes(self.network, node, batch)
        return visit_bytes(self, node, images, batch)

    def visit(self, node: Node, sweep: Sweep) -> None:
        if not node.fitted:
            self._set_statistics(node, sweep)
        elif self.fit.solver == "adam":
            self._fit_alone(node, sweep, fit_adam)
        elif node.grouped:
            self._fit_alone(node, sweep, fit_grouped)
        else:
            self._fit_exact(node, sweep)

    # -- the closed form ----------------------------------------------------------------------------------------

    def _fit_exact(self, node: Node, sweep: Sweep) -> None:
        module = self.network.map_of(node)
        norm = self.norms.get(node.name)
        separate_heads = self.own_rows(node)
        device = sweep.batches[0].images.device
        intercept = module.bias is not None or norm is not None
        equations = self._equations(node, sweep, intercept)
        for index, batch in enumerate(sweep.batches):
            into = equations[batch.task if separate_heads else 0]
            self.each_rows(node, sweep, index, partial(into.add, weight=sweep.weights[batch.task]))
        starts = self._starts(node)
        left = energy = 0.0
        biases = torch.zeros(module.outputs.width, dtype=torch.float64, device=device)
        moments = torch.zeros(2, module.outputs.width, dtype=torch.float64, device=device)
        for i, block in enumerate(module.blocks):
            for rows in self._row_sets(node, block):
                these = equations[int(module.outputs.owner[rows[0]]) if separate_heads else 0]
                found = self._solve_rows(node, these, i, rows, starts[i])
                biases[rows] = found.bias
                if intercept:
                    moments[:, rows] = found.moments
                left += float(found.residual.sum())
                energy += float(found.energy.sum())
                del found  # before the next block's is made beside it
        fitted = ~self.exact[node.name].to(device)
        self.install_offset(node, norm, fitted, biases, moments)
        if fitted.any():
            self.record.append(LayerFit(layer_of(node), left / energy if energy > 0 else 0.0))

    def _equations(self, node: Node, sweep: Sweep, intercept: bool) -> list[NormalEquations | RowEquations]:
        """One for all tasks, or one for each where a task has a head of its own."""
        module, example = self.network.map_of(node), sweep.batches[0].images
        sizes, every = map_sizes(module), range(len(self.sources))
        tasks = [[task] for task in every] if self.own_rows(node) else [list(sweep.weights)]
        if few_rows(self.network, node, sum(len(batch.images) for batch in sweep.batches)) is None:
            return [NormalEquations(*sizes, intercept, example.device) for _ in tasks]
        images = [sum(len(batch.images) for batch in sweep.batches if batch.task in own) for own in tasks]
        counts = [few_rows(self.network, node, count) for count in images]
        return [RowEquations(count, *sizes, intercept, sweep.dtype, example.device) for count in counts]

    def _solve_rows(
        self, node: Node, equations: NormalEquations | RowEquations, i: int, rows: Tensor, start: Tensor
    ) -> Solution:
        """Solve and install some rows of a layer's block i."""
        module = self.network.map_of(node)
        weight, block = module.weights[i], module.blocks[i]
        columns = tap_columns(block.columns.to(weight.device), weight.shape[2:].numel())
        local = rows - block.start
        found = equations.solve(
            rows.to(weight.device), columns, weight_matrix(start[local]).double(), self.ridge, node.name
        )
        weight[local] = found.weight.to(weight.dtype).view_as(weight[local])
        return found

    def _starts(self, node: Node) -> list[Tensor]:
        """What the ridge holds to, block by block: the average of the maps that are fitted.

        Where the batch norm behind is folded in, that is the average of the sources' scaled weights.
        """
        module = self.network.map_of(node)
        if node.name not in self.folded:
            return list(module.weights)
        norm, scaled = self.folded[node.name], []
        trace, shared = self.network.trace, self.network.shared
        for m, source in enumerate(self.sources):
            weight = source.state[node.parameters["weight"]]
            weight = weight * norm_scale(norm, source.state).view(-1, *[1] * (weight.dim() - 1))
            weight = self.alignment.read(weight, trace.layouts[node.inputs[0]], shared, m)
            scaled.append(self.alignment.view(weight, trace.layouts[node.name], 0, shared, m))
        shares = entry_shares(self.network, self.alignment, node.name, scaled[0])
        return [
            average_block(scaled, block, module.inputs, module.outputs, shares) for block in module.blocks
        ]

    def _row_sets(self, node: Node, block: Block) -> list[Tensor]:
        """Rows of a block to be solved together: those that are no copies, one network's head at a time."""
        rows = torch.arange(block.start, block.stop)
        rows = rows[~self.exact[node.name][rows]]
        if self.own_rows(node) and len(rows):
            owner = self.network.map_of(node).outputs.owner[rows]
            return [rows[owner == m] for m in owner.unique()]
        return [rows] if len(rows) else []

    def install_offset(
        self, node: Node, norm: Node | None, fitted: Tensor, biases: Tensor, moments: Tensor
    ) -> None:
        """Put the intercept where the architecture has a place for it: the bias or the batch norm behind."""
        module = self.network.map_of(node)
        if node.name in self.folded:
            if module.bias is not None:  # one place for the offset is enough
                module.bias[fitted] = 0.0
            self.offsets[norm.name] = biases
            self._fold(norm, fitted, moments)
        elif module.bias is not None:
            module.bias[fitted] = biases[fitted].to(module.bias.dtype)

    def _fold(self, norm: Node, fitted: Tensor, moments: Tensor) -> None:
        """Make the batch norm the shift that the fit asks for, with the statistics of its own input.

        The layer was fitted to what the sources' batch norms give; statistics that are recomputed later on the
        same images leave the function alone.
        """
        bn = self.network.map_of(norm)
        mean, variance = moments.to(bn.running_mean.dtype)
        bn.running_mean[fitted] = mean[fitted]
        bn.running_var[fitted] = variance[fitted]
        bn.weight[fitted] = (variance + bn.eps).sqrt()[fitted]
        bn.bias[fitted] = (self.offsets[norm.name] + moments[0]).to(bn.bias.dtype)[fitted]

    # -- batch norm ---------------------------------------------------------------------------------------------

    def _set_statistics(self, norm: Node, sweep: Sweep) -> None:
        """The exact mean and variance of the merged network's own values, every task weighing the same."""
        moments = merged_moments(norm, sweep)
        fitted = ~self.exact[norm.name].to(moments.device)
        if norm.name in self.offsets:
            self._fold(norm, fitted, moments)
        else:
            install_statistics(self.network.map_of(norm), moments, fitted)

    # -- rows ---------------------------------------------------------------------------------------------------

    def inputs(self, node: Node, sweep: Sweep, index: int) -> Tensor:
        """z of one batch, in the merged network's entries."""
        if self.fit.inputs == "merged":
            return sweep.of_merged(node.inputs[0], index)
        values = [sweep.source(m, node.inputs[0], index) for m in range(len(self.sources))]
        return self._assemble(values, node.inputs[0], sweep.batches[index].task)

    def targets(self, node: Node, sweep: Sweep, index: int) -> Tensor:
        """y of one batch, in the merged network's entries."""
        values = [sweep.source(m, node.name, index) for m in range(len(self.sources))]
        if node.name in self.folded:
            norm = self.folded[node.name]
            values = [s.run_node(norm, [v]) for s, v in zip(self.sources, values, strict=True)]
        elif node.name in self.scaled:  # what is mixed has the scale that the batch norm behind gives it
            norm, dim = self.scaled[node.name], self.network.trace.layouts[node.name].dim
            shape = [-1 if d == dim else 1 for d in range(values[0].dim())]
            scales = [norm_scale(norm, source.state).view(shape) for source in self.sources]
            values = [v * scale for v, scale in zip(values, scales, strict=True)]
        return self._assemble(values, node.name, sweep.batches[index].task)

    def _assemble(self, values: Sequence[Tensor], name: str, task: int) -> Tensor:
        """Separate entries: their own network's. Shared ones: the mean (ensemble) or the owner's (own).

        Where the owner has no part in a merged unit, its value is that of the others.
        """
        layout, parts = self.network.trace.layouts[name], self.network.arrangement(name)
        values = [
            self.alignment.view(value, layout, layout.dim, self.network.shared, m)
            for m, value in enumerate(values)
        ]
        shape = list(values[0].shape)
        shape[layout.dim] = parts.width
        result = values[0].new_zeros(shape)
        shares = entry_shares(self.network, self.alignment, name, values[0])
        for m, (value, share, positions) in enumerate(zip(values, shares, parts.positions, strict=True)):
            if self.fit.targets == "own":
                decided = (parts.owner[positions] < 0).to(share.device)
                if decided.any():
                    decided &= shares[task] > 0
                share = torch.where(decided, float(m == task), share)
            counted = share.nonzero().flatten()
            part = value if len(counted) == len(share) else value.index_select(layout.dim, counted)
            if (share[counted] != 1).any():
                part = part * share[counted].view(*[-1 if d == layout.dim else 1 for d in range(part.dim())])
            result.index_add_(layout.dim, positions.to(result.device)[counted], part)
        return result

    def each_rows(self, node: Node, sweep: Sweep, index: int, use: Callable[[Tensor, Tensor], None]) -> None:
        """Call ``use`` with the rows of z and y of one batch. Nothing of a batch is held when the next is made."""
        z, y = self.inputs(node, sweep, index), self.targets(node, sweep, index)
        step = images_by_row(self.network, node)
        for z_some, y_some in zip(z.split(step), y.split(step), strict=True):
            use(*self._rows(node, z_some, y_some))

    def _rows(self, node: Node, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z rows and y rows of some images at the drawn positions."""
        kernel = kernel_of(self.network.map_of(node).weights[0])
        z_rows, y_rows = input_rows(node, z, kernel), output_rows(node, y)
        if self.positions < 1 and node.operation != "linear" and y[0, 0].numel() > 1:
            count = max(1, round(self.positions * len(z_rows)))
            kept = torch.randperm(len(z_rows), generator=self.generator)[:count].to(z.device)
            z_rows, y_rows = z_rows[kept], y_rows[kept]
        return z_rows, y_rows

    def own_rows(self, node: Node) -> bool:
        """Heads of separate label spaces are fitted on their own task's rows, where images have a task."""
        separate = self.network.labels == "separate" and node is self.network.head
        return separate and self.owned

    # -- other solvers ------------------------------------------------------------------------------------------

    def _fit_alone(self, node: Node, sweep: Sweep, solver: Callable[..., float]) -> None:
        """The published iteration, and the parts of grouped convolutions."""
        fitted = ~self.exact[node.name]
        if fitted.any():
            residual = solver(self, node, sweep, fitted)
            self.record.append(LayerFit(layer_of(node), residual))


def layer_of(node: Node) -> str:
    """The module path of a linear node."""
    return node.parameters["weight"].rpartition(".")[0] or node.name
