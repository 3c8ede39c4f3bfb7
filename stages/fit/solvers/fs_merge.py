"""FS-Merge (Kinderman et al. 2025): M and U of W = M diag(W_1, ..., W_N) U are trained end to end, then multiplied out.

Without labels: each image is seen by the network that owns it, and the mean squared error is that of the owner's last
features, which U of the head reads out of the merged network's. Where all tasks share a head and labels, so that nobody
says whose an image is, it is that of the logits. As many images again are changed: cropped, mirrored, and one of grey,
solarised or blurred. Batch norms are as they are in use.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.core.images.augment import augment
from stages.core.recipe.rooms import SOLVERS
from stages.core.runtime.errors import InputError
from stages.core.runtime.progress import Bar
from stages.core.runtime.schedule import cycle
from stages.core.settings.sections import Count, Fraction, NonNegative, Section
from stages.fit.problem import LayerSolution
from stages.fit.setup import Setup
from stages.fit.solver import LayerSolvers
from stages.fit.supernet import Supernet
from stages.fit.teachers import step_entries, values_at


class Training(Section):
    """rank: of M and U beside their diagonals. images: of each task, the first ones. augmented: as many more, changed
    ones, where the input is an image. warmup: share of the steps."""

    rank: Count = 12
    epochs: Count = 100
    images: Count = 100
    augmented: bool = True
    weight_decay: NonNegative = 1e-3
    warmup: Fraction = 0.1


class FsMerge:
    """Trains all layers at once. Settings: fit.learning_rate, fit.batch_size, and its own."""

    def __init__(self, setup: Setup, training: Training) -> None:
        if setup.alignment.groups:
            raise InputError(
                "fit.solver: found fs_merge behind an alignment by matrices; allowed: a matching that is a permutation"
            )
        self.setup, self.training, self.images = setup, training, training.images

    def bytes(self) -> int:
        """What it holds at most: a step forward and back, weights in their steps, images and what is imitated."""
        network, graph = self.setup.network, self.setup.network.trace.graph
        values = [network.entries(node.name) for node in graph.nodes]
        step = self.setup.fit.batch_size * step_entries(network)
        of_sources = sum(tensor.numel() for tensor in self.setup.sources[0].state.values())
        weights = 5 * network.networks * of_sources + 3 * sum(own.numel() for own in network.parameters())
        images = 2 * self.training.images * network.networks * (values[0] + max(values[-2:]))
        return next(network.parameters()).element_size() * (step + weights + images)

    def fit(self, images: Sequence[Tensor], progress: str | None = None) -> LayerSolution | None:
        """Train on the images of each task, (n, ...), and install; the residual is that of the images as they end up.

        The losses of all epochs are in the network's ``about``.
        """
        setup, training, generator = self.setup, self.training, self.setup.generator
        supernet = Supernet(setup, training.rank)
        if not any(True for _ in supernet.parameters()):
            return None  # everything is a copy
        data = [self._lessons(m, own) for m, own in enumerate(images)]
        x, task = torch.cat([own[0] for own in data]), torch.cat([own[1] for own in data])
        goals = torch.cat([own[2] for own in data])
        optimizer = torch.optim.AdamW(
            supernet.parameters(), lr=setup.fit.learning_rate, weight_decay=training.weight_decay
        )
        per_epoch = -(-len(x) // setup.fit.batch_size)
        steps, step, losses = training.epochs * per_epoch, 0, []
        with torch.enable_grad(), Bar(total=steps, desc=progress, unit="step", shown=bool(progress)) as bar:
            for _ in range(training.epochs):
                order, total = torch.randperm(len(x), generator=generator), 0.0
                for i in order.to(x.device).split(setup.fit.batch_size):
                    for group in optimizer.param_groups:
                        group["lr"] = setup.fit.learning_rate * cycle(step, steps, training.warmup)
                    loss = self.errors(supernet, x[i], task[i], goals[i]).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total, step = total + float(loss.detach()) * len(i), step + 1
                    bar.update()
                losses.append(total / len(x))
        with torch.no_grad():
            multiplied = supernet.tensors()
            for name, own in setup.network.named_parameters():
                own.copy_(multiplied.get(name, own))
            left = sum(
                float(self.errors(supernet, *own).sum())
                for own in zip(*(v.split(setup.fit.batch_size) for v in (x, task, goals)), strict=True)
            )
        setup.network.about["fs_merge"] = {"losses": [float(f"{loss:.6g}") for loss in losses]}
        energy = sum(float((own[2] - own[2].mean(0)).double().square().mean(-1).sum()) for own in data)
        return LayerSolution(left, energy)

    @property
    def _imitated(self) -> str:
        """The value of a source that is imitated."""
        graph = self.setup.network.trace.graph
        return graph.head.inputs[0] if self.setup.network.labels == "separate" else graph.scores.name

    def _lessons(self, task: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images of a task, whose they are, and the owner's value for each, flat."""
        source, name = self.setup.sources[task], self._imitated
        x = images
        if self.training.augmented and x.dim() == 4 and x.is_floating_point():
            x = torch.cat([x, changed(x, self.setup.generator)])
        with torch.no_grad():
            found = [
                values_at(source, source.graph, part, [name])[name].reshape(len(part), -1)
                for part in x.split(self.setup.fit.batch_size)
            ]
        return x, torch.full((len(x),), task, device=x.device), torch.cat(found)

    def errors(self, supernet: Supernet, x: Tensor, task: Tensor, goals: Tensor) -> Tensor:
        """Mean squared error of each image, (n,). goals: (n, entries)."""
        network, name = self.setup.network, self._imitated
        run = _Running(network, name)
        tensors = {f"network.{key}": value for key, value in supernet.tensors().items()}
        value = torch.func.functional_call(run, tensors, (x,))
        if network.labels == "shared":
            return (value.reshape(len(x), -1) - goals).square().mean(1)
        found, key = value.new_zeros(len(x)), f"{network.head.name}_"
        dim = network.trace.layouts[name].dim
        for m, positions in enumerate(network.arrangement(name).positions):
            i = (task == m).nonzero().flatten()
            if not len(i):
                continue
            own = value.unflatten(0, (len(x), -1))[i].flatten(
                0, 1
            )  # an image may be several rows, as frames are
            own = own.index_select(dim, positions.to(value.device))
            if key in supernet.reads:
                own = supernet.reads[key].after(m, own.movedim(dim, -1)).movedim(-1, dim)
            found = found.index_add(0, i, (own.reshape(len(i), -1) - goals[i]).square().mean(1))
        return found


class _Running(nn.Module):
    """One value of a merged network."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, x: Tensor) -> Tensor:
        return values_at(self.network, self.network.trace.graph, x, [self.name])[self.name]


def changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image cropped, half of them mirrored, and one of grey, solarised or blurred. (n, c, h, w) as normalised."""
    x = augment(images, max(1, images.shape[-1] // 8), True, generator)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    grey = x.mean(1, keepdim=True).expand_as(x)
    solarised = torch.where(x > (low + high) / 2, low + high - x, x)
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    drawn = torch.randint(3, (len(x), 1, 1, 1), generator=generator).to(x.device)
    return torch.where(drawn == 0, grey, torch.where(drawn == 1, solarised, blurred))


@SOLVERS.register(
    uses=("learning_rate", "batch_size"), own=Training, always={"inputs": "merged", "targets": "own"}
)
def fs_merge(setup: Setup) -> LayerSolvers:
    """One for the whole network."""
    return LayerSolvers(whole=FsMerge(setup, setup.fit.own(Training)))
