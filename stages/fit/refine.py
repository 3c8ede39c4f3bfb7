"""Refining: the fitted network learns end to end, without labels, from the networks that own the images.

The layer-wise fit asks each merged layer to imitate the sources' features, which a narrow layer cannot do for all of
them at once; what the network concludes can still be right. A few hundred steps of Muon over one cycle, batch norm in
training mode on batches of every task, the loss of stages.fit.teachers.

It does not make a merge worse by its own measure: a tenth of each task's images is held out, and the state with the
lowest loss there is kept, each with its batch-norm statistics recomputed, as the network is used. The fitted network is
one of these states, and another must beat it by more than the standard error of the difference. Entries that are
copies of a source's stay copies.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stages.core.align.alignment import Alignment
from stages.core.graph.source import Source
from stages.core.images.augment import augment
from stages.core.images.batches import Pool
from stages.core.merged.copies import exact_entries
from stages.core.merged.network import MergedNetwork
from stages.core.recipe.methods import Refine
from stages.core.runtime import ranks
from stages.core.runtime.errors import InputError
from stages.core.runtime.progress import Bar
from stages.core.runtime.schedule import cycle
from stages.core.sweep.memory import check_memory
from stages.core.sweep.norms import statistics_bytes
from stages.fit.held_out import ONE_IN, Examiner, Images, Look, read
from stages.fit.kept import KeptEntries
from stages.fit.optimizers import Optimizers
from stages.fit.shared_norms import SharedNorms
from stages.fit.teachers import Teacher, step_entries, values_at, watched_values

logger = logging.getLogger(__name__)


def refine(
    network: MergedNetwork,
    sources: Sequence[Source],
    images: Sequence[Images],
    settings: Refine,
    *,
    alignment: Alignment | None = None,
    owned: bool = True,
    shift: int = 0,
    flip: bool = False,
    generator: torch.Generator | None = None,
    memory: float | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Refine ``network`` in place.

    sources: units in merged order. images: unlabelled ones of each task, (n, ...) preprocessed; or, with ``owned``
    false, one set that belongs to no task, which is learnt as the ensemble sees it. shift, flip: how the sources'
    training moves images, where the settings do not say. memory: GiB, None for what is free. Returns a record for
    people: how many images of what it saw, the losses held out, what was kept and why. Raises InputError when a task
    has fewer than two images, or when it would not fit in memory; an error or an interruption leaves the network as
    it was.
    """
    settings = settings.model_copy(
        update={
            "shift": shift if settings.shift is None else settings.shift,
            "flip": flip if settings.flip is None else settings.flip,
        }
    )
    _check(network, images, settings, owned)
    if ranks.count() > 1:  # all draw the same images, and each looks at its share of them
        generator = generator or torch.Generator().manual_seed(0)
        generator.set_state(ranks.said_by_first(generator.get_state()))
    alignment = alignment or Alignment(len(sources))
    generator = generator or torch.Generator().manual_seed(0)
    run = _Run(network, sources, images, settings, alignment, owned, generator, memory)
    fitted = _copy(network)
    try:
        with torch.enable_grad():
            return run(fitted, progress)
    except BaseException:  # an interruption too
        network.load_state_dict(fitted)
        raise
    finally:
        network.eval()
        network.to(memory_format=torch.contiguous_format)


class _Run:
    """One refinement."""

    def __init__(
        self,
        network: MergedNetwork,
        sources: Sequence[Source],
        images: Sequence[Images],
        settings: Refine,
        alignment: Alignment,
        owned: bool,
        generator: torch.Generator,
        memory: float | None,
    ) -> None:
        self.network, self.images, self.settings, self.generator = network, images, settings, generator
        example = next(network.parameters())
        self.device = example.device
        self.mixed = example.is_cuda and example.dtype == torch.float32
        self.names = [task.name for task in network.tasks] if owned else ["proxy"]
        exact = exact_entries(network)
        self.kept = KeptEntries(network, exact)
        names = watched_values(network.trace, settings.features)
        self.examiner = Examiner(network, exact, images, owned, names)
        check_memory(self._bytes(len(sources)), memory, self.device, "refine")
        sources = [_channels_last(source) for source in sources]
        members = [[m] for m in range(len(sources))] if owned else [list(range(len(sources)))]
        self.teachers = [Teacher(network, sources, alignment, own, names, settings.joint) for own in members]
        for task, teacher in enumerate(self.teachers):
            teacher.measure(self.examiner.statistics_of(task))

    def __call__(self, fitted_state: dict[str, Tensor], progress: str | None) -> dict[str, Any]:
        found = {"images": self._counts()}
        if self.kept.everything:
            return {**found, "steps": 0, "kept": 0, "why": "every weight is a copy of a source's"}
        states = {0: fitted_state}  # and that of the best look
        self.network.to(memory_format=torch.channels_last)
        fitted = self._look(0)
        best, curve, stopped = fitted, [[0, fitted.mean]], None
        with self.kept, SharedNorms(self.network), self._bar(progress) as bar:
            for step, loss in self._steps():
                bar.update()
                if not math.isfinite(loss):
                    stopped = f"the loss is {loss} at step {step}"
                    break
                if step % self.settings.every and step < self.settings.steps:
                    continue
                look = self._look(step)
                curve.append([step, look.mean])
                if look.mean < best.mean:
                    best, states = look, {0: fitted_state, step: _copy(self.network)}
                bar.set_postfix({"held out": f"{look.mean:.4f}", "best": f"{best.mean:.4f}"})
                if step - best.step >= self.settings.patience * self.settings.every:
                    stopped = f"nothing better in {self.settings.patience} looks"
                    break
                self.network.train()
        return {**found, **self._settle(fitted, best, states, curve, stopped)}

    def _settle(
        self, fitted: Look, best: Look, states: dict[int, dict[str, Tensor]], curve: list, stopped: str | None
    ) -> dict[str, Any]:
        """Keep the best state where it beats the fitted one, else that one to the last bit."""
        kept, why = best, "lowest loss on the images held out"
        if not best.beats(fitted):
            kept, why = fitted, "no state beats the fitted one by more than the standard error"
        self.network.load_state_dict(states[kept.step])
        if stopped and "loss" in stopped:
            logger.warning("refine: %s; the state of step %d is kept", stopped, kept.step)
        return {
            "steps": curve[-1][0],
            "kept": kept.step,
            "why": why,
            "stopped": stopped,
            "held_out": {"fitted": _rounded(fitted.mean), "kept": _rounded(kept.mean)},
            "curve": [[step, _rounded(loss)] for step, loss in curve],
        }

    def _look(self, step: int) -> Look:
        return self.examiner.look(step, self.teachers)

    def _steps(self) -> Iterator[tuple[int, float]]:
        """Step by step: its number, from 1, and its loss before it."""
        settings, graph = self.settings, self.network.trace.graph
        optimizers = Optimizers(self.network, settings)
        orders = [self._order(apart.learnt) for apart in self.examiner.apart]
        batches = [read(own, order) for own, order in zip(self.images, orders, strict=True)]
        self.network.train()
        for step in range(settings.steps):
            whole = [self._changed(next(own)) for own in batches]
            parts = [x[ranks.share(len(x)).to(x.device)] for x in whole] if ranks.count() > 1 else whole
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                lessons = [teacher(x) for teacher, x in zip(self.teachers, parts, strict=True)]
                values = values_at(self.network, graph, torch.cat(parts), self.teachers[0].names)
            losses, start = [], 0
            for teacher, lesson, x, all_ in zip(self.teachers, lessons, parts, whole, strict=True):
                own = {name: value[start : start + len(x)] for name, value in values.items()}
                losses.append(_mean(teacher.losses(own, lesson), len(all_)))
                start += len(x)
            loss = torch.stack(losses).sum()
            optimizers.zero_grad()
            loss.backward()
            _add_up_gradients(self.network, loss)
            found = loss.item()
            if math.isfinite(found):
                optimizers.step(cycle(step, settings.steps, settings.warmup))
            self.kept.restore()
            yield step + 1, found

    def _order(self, indices: Tensor) -> Sequence[Tensor]:
        """Which images each step sees: all of them before any a second time."""
        count = self.settings.steps * self.settings.batch_size
        rounds = [
            indices[torch.randperm(len(indices), generator=self.generator)]
            for _ in range(math.ceil(count / len(indices)))
        ]
        return torch.cat(rounds)[:count].split(self.settings.batch_size)

    def _changed(self, x: Tensor) -> Tensor:
        if not (self.settings.shift or self.settings.flip):
            return x
        return augment(x, self.settings.shift, self.settings.flip, self.generator).contiguous(
            memory_format=torch.channels_last
        )

    def _bar(self, progress: str | None) -> Bar:
        return Bar(total=self.settings.steps, desc=progress, unit="step", shown=bool(progress))

    def _counts(self) -> dict[str, dict[str, int]]:
        """How many images of what were seen, of each task."""
        counts = {}
        for name, own, apart in zip(self.names, self.images, self.examiner.apart, strict=True):
            parts = own.parts if isinstance(own, Pool) else {"calibration": own}
            counts[name] = {split: len(part) for split, part in parts.items()}
            counts[name]["held_out"] = len(apart.held)
        return counts

    def _bytes(self, networks: int) -> int:
        """What it holds at most: a step forward and back, or a look; and the weights in all their copies."""
        network, examiner = self.network, self.examiner
        size = next(network.parameters()).element_size()
        own = network.trace.largest
        images = self.settings.batch_size * len(self.images)
        step = images * (step_entries(network) + 3 * networks * own)
        look = statistics_bytes(network, examiner.exact, examiner.statistics) if examiner.norms else 0
        weights = 8 * sum(
            p.numel() for p in network.parameters()
        )  # gradient, Adam's two, three states, copies
        return size * weights + examiner.lesson_bytes + max(size * step, look)


def _check(network: MergedNetwork, images: Sequence[Images], settings: Refine, owned: bool) -> None:
    names = [task.name for task in network.tasks] if owned else ["proxy"]
    for name, own in zip(names, images, strict=True):
        if len(own) < 2:
            raise InputError(
                f"refine: found {len(own)} unlabelled images of {name}; allowed: two or more, as one is held out"
            )
        ranks.check_share(
            min(len(own) // ONE_IN, settings.batch_size), "images of a task in a step, or held out"
        )
    shape = network.trace.shapes[network.trace.graph.nodes[0].name]
    if (settings.shift or settings.flip) and len(shape) != 4:
        raise InputError(
            f"refine: shift and flip: found {settings.shift} and {settings.flip} for inputs of {len(shape)} "
            "dimensions; allowed: 0 and false, as only images are moved"
        )


def _mean(losses: Tensor, images: int) -> Tensor:
    """What this rank's images add to the mean over all ``images`` of a step."""
    return losses.mean() if len(losses) == images else losses.sum() / images


@torch.no_grad()
def _add_up_gradients(network: MergedNetwork, loss: Tensor) -> None:
    """Over all ranks, in one message; and the loss."""
    if ranks.count() == 1:
        return
    gradients = [own.grad for own in network.parameters() if own.grad is not None]
    flat = torch.cat([loss.detach().reshape(1).to(gradients[0].dtype), *(own.flatten() for own in gradients)])
    ranks.add_up(flat)
    loss.copy_(flat[0])
    start = 1
    for own in gradients:
        own.copy_(flat[start : start + own.numel()].view_as(own))
        start += own.numel()


def _copy(network: MergedNetwork) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _channels_last(source: Source) -> Source:
    state = {
        name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in source.state.items()
    }
    return replace(source, state=state)


def _rounded(loss: float) -> float | None:
    """Six digits, in a file that has no NaN."""
    return float(f"{loss:.6g}") if math.isfinite(loss) else None
