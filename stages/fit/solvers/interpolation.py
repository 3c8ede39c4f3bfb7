"""Neuron interpolation (arXiv 2507.00037): level by level, on the merged network's own features, to the centroids.

Behind the alignment ``kmeans`` the mean of the sources' outputs in merged units is the centroid of each cluster of
their units. A level ends where a linear map does (or the batch norm behind, with norm: fold), so that all of them are
solved by least squares. Only the head is not linear in its target, the mean of the sources' softmax: from the closed
form for their mean logits it goes on by Adam, and the state is kept that has the lowest cross entropy on a fifth of the
images. A head of separate label spaces is fitted to its own network's softmax, on its own task's images.
"""

import torch
from torch import Tensor

from stages.core.recipe.rooms import SOLVERS
from stages.core.settings.sections import Count, NonNegative, Section
from stages.fit.layer import Layer
from stages.fit.mixing import Mixing
from stages.fit.problem import LayerProblem, LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.solvers.exact import Dense, Grouped


class Head(Section):
    """How the head is trained, beside fit.learning_rate and fit.batch_size. patience: in epochs."""

    epochs: Count = 100
    patience: Count = 5
    weight_decay: NonNegative = 1e-4


class Level(Dense):
    """The closed form; of the head, which holds its inputs and targets of all images, where Adam starts."""

    over_ranks = False

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def _trained(self, layer: Layer) -> bool:
        head = layer.setup.network.head
        trained = head is not None and head.operation == "linear" and layer.norm is None
        return trained and layer.node.name == head.name

    def bytes(self, layer: Layer, images: int, batch: int) -> int:
        solving = super().bytes(layer, images, batch)
        if not self._trained(layer):
            return solving
        module, (z, y) = layer.module, layer.entries
        most = max(layer.setup.fit.batch_size, batch)  # of a step, or of a look at the images held out
        weights = 5 * sum(
            own.numel() for own in module.parameters()
        )  # gradient, Adam's two, the best, a step
        return max(solving, module.weights[0].element_size() * (most * (2 * z + 8 * y) + weights))

    def kept_bytes(self, layer: Layer, images: int) -> int:
        y = layer.entries[1] if self._trained(layer) else 0
        return layer.module.weights[0].element_size() * images * y

    def fit(self, problem: LayerProblem) -> LayerSolution | None:
        found, layer = super().fit(problem), problem.layer
        if found is None or not self._trained(layer):
            return found
        if layer.module.bias is not None:
            layer.module.bias.copy_(found.bias)
        data = _Data(problem)
        self._descend(problem, data)
        residual, energy = data.errors()
        data.close()
        return LayerSolution(residual, energy, ridge=found.ridge)

    @torch.enable_grad()
    def _descend(self, problem: LayerProblem, data: "_Data") -> None:
        fit, parameters = problem.setup.fit, list(problem.layer.module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=fit.learning_rate, weight_decay=self.head.weight_decay)
        best, kept, at = data.held_loss(), [own.detach().clone() for own in parameters], 0
        for epoch in range(1, self.head.epochs + 1):
            order = torch.randperm(len(data.learnt), generator=problem.setup.generator)
            for drawn in data.learnt[order].split(fit.batch_size):
                optimizer.zero_grad()
                data.loss(drawn).mean().backward()
                optimizer.step()
            loss = data.held_loss()
            if loss < best:
                best, kept, at = loss, [own.detach().clone() for own in parameters], epoch
            elif epoch - at >= self.head.patience:
                break
        with torch.no_grad():
            for own, value in zip(parameters, kept, strict=True):
                own.copy_(value)


class _Data:
    """Inputs of the head and the softmax that it is to give, of all images.

    learnt, held: (images, 2), batch and place. With too few images to hold some out, all of them are both.
    """

    def __init__(self, problem: LayerProblem) -> None:
        self.module, network = problem.layer.module, problem.setup.network
        outputs = self.module.outputs
        apart = network.labels == "separate"
        self.heads = list(outputs.positions) if apart else [torch.arange(outputs.width)]
        self.heads = [own.to(problem.layer.device) for own in self.heads]
        self.z, self.goal, self.counts = problem.keep(), problem.keep(), list[Tensor]()
        learnt, held = [], []
        for index, task, weight in problem.batches():
            self.z.append(problem.inputs(index))
            self.goal.append(self._goal([problem.source(m, index) for m in range(network.networks)]))
            owned = [float(not problem.layer.own_rows or m == task) for m in range(len(self.heads))]
            self.counts.append(weight * torch.tensor(owned, device=problem.layer.device))
            for i in range(problem.size(index)):
                chosen = held if problem.fifth is not None and problem.fifth[index][i] else learnt
                chosen.append((index, i))
        self.learnt = torch.tensor(learnt)
        self.held = torch.tensor(held) if held else self.learnt

    def _goal(self, logits: list[Tensor]) -> Tensor:
        """The softmax of each head: of its network, or the mean of all."""
        own = [value.softmax(-1) for value in logits]
        return torch.cat(own, -1) if len(self.heads) > 1 else sum(own) / len(own)

    def loss(self, drawn: Tensor) -> Tensor:
        """Cross entropy of some images, by rows of ``learnt`` or ``held``."""
        found = []
        for b in drawn[:, 0].unique().tolist():
            i = drawn[drawn[:, 0] == b, 1]
            logits, goal = self.module(self.z.rows(b, i)), self.goal.rows(b, i)
            for own, counts in zip(self.heads, self.counts[b], strict=True):
                entropy = -(goal[..., own] * logits[..., own].log_softmax(-1)).sum(-1)
                found.append(counts * entropy)
        return torch.cat([own.flatten() for own in found])

    @torch.no_grad()
    def held_loss(self) -> float:
        """Mean over the images held out."""
        return float(self.loss(self.held).double().mean())

    @torch.no_grad()
    def errors(self) -> tuple[float, float]:
        """Squared error of the softmax over all images, and the energy of its target about the mean."""
        left = total = squares = count = 0.0
        for b, counts in enumerate(self.counts):
            logits, goal = self.module(self.z[b]), self.goal[b].double()
            for own, counted in zip(self.heads, counts.tolist(), strict=True):
                left += counted * float(
                    (logits[..., own].double().softmax(-1) - goal[..., own]).square().sum()
                )
            rows = goal.flatten(0, -2)
            total, squares, count = total + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
        return left, float((squares - total.square() / count).sum())

    def close(self) -> None:
        self.z.close()
        self.goal.close()


@SOLVERS.register(
    uses=("norm", "ridge", "learning_rate", "batch_size"),
    own=Head,
    always={"inputs": "merged", "targets": "ensemble"},
    chooses_ridge=True,
)
def interpolation(setup: Setup) -> LayerSolvers:
    """One for each kind of layer."""
    return LayerSolvers(Level(setup.fit.own(Head)), Grouped(), Mixing(setup))
