"""Images held out while a merged network is refined, and what they say of a state of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.images.batches import Pool
from stages.core.images.decoding import ahead
from stages.core.merged.network import MergedNetwork
from stages.core.runtime import ranks
from stages.core.sweep.batches import NO_TASK, Batch
from stages.core.sweep.norms import set_statistics
from stages.fit.teachers import Lesson, Teacher, values_at

ONE_IN, MOST = 10, 512  # images held out: one in so many, at most so many of each task
MEASURED_ON = 400  # images of each task that batch-norm statistics are computed on
AT_A_TIME = 100  # images, where nothing is learnt
KEPT_LESSONS = 2**29  # bytes of what teachers say about the images held out: of more, they are asked again

Images = Pool | Tensor


@dataclass(frozen=True)
class Apart:
    """Indices of a task's images: those that are learnt from and those that are held out, evenly spread."""

    learnt: Tensor
    held: Tensor


def take_apart(count: int) -> Apart:
    """A tenth of ``count`` images, one at least, is held out, however often it is asked."""
    held = min(MOST, max(1, count // ONE_IN))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.arange(held) * count // held] = True
    return Apart((~chosen).nonzero().flatten(), chosen.nonzero().flatten())


@dataclass(frozen=True)
class Look:
    """The loss of every image held out, by task, at one step."""

    step: int
    losses: tuple[Tensor, ...]

    @property
    def mean(self) -> float:
        """Every task weighs the same."""
        return float(torch.stack([own.mean() for own in self.losses]).mean())

    def beats(self, other: "Look") -> bool:
        """Whether it is lower by more than the standard error of the difference, image by image.

        One image of a task says nothing of the spread: False.
        """
        gains = [b - a for a, b in zip(self.losses, other.losses, strict=True)]
        if min(len(own) for own in gains) < 2:
            return False
        error = torch.stack([own.var() / len(own) for own in gains]).sum().sqrt() / len(gains)
        return bool(torch.stack([own.mean() for own in gains]).mean() > error)


class Examiner:
    """Looks at states of ``network`` as they are used: with batch-norm statistics recomputed on unlabelled images.

    exact: entries whose statistics stay. images, teachers: of each task, or of a proxy alone. watched: values that are
    imitated. What the teachers say is asked for once, as long as it is no more than ``KEPT_LESSONS``.
    """

    def __init__(
        self,
        network: MergedNetwork,
        exact: Mapping[str, Tensor],
        images: Sequence[Images],
        owned: bool,
        watched: Sequence[str] = (),
    ) -> None:
        self.network, self.exact, self.images = network, exact, images
        self.apart = [take_apart(len(own)) for own in images]
        count = min(MEASURED_ON, *(len(own.learnt) for own in self.apart))
        self.statistics = [
            Batch(x, task if owned else NO_TASK)
            for task, (own, apart) in enumerate(zip(images, self.apart, strict=True))
            for x in read(own, _shared(apart.learnt[:count]).split(AT_A_TIME))
        ]
        self.norms = any(node.operation == "batch_norm" for node in network.trace.graph.nodes)
        one = sum(network.entries(name) for name in watched) * next(network.parameters()).element_size()
        held = sum(len(own.held) for own in self.apart)
        self.keeps = one * held <= KEPT_LESSONS
        self.lesson_bytes = one * (held if self.keeps else min(AT_A_TIME, held))
        self.lessons: dict[tuple[int, int], Lesson] = {}

    def statistics_of(self, task: int) -> list[Tensor]:
        """Images of one task that are not held out."""
        return [batch.images for batch in self.statistics if batch.task in (task, NO_TASK)]

    @torch.no_grad()
    def look(self, step: int, teachers: Sequence[Teacher]) -> Look:
        """Leaves the network in evaluation mode, with the statistics that go with its weights."""
        self.network.eval()
        if self.norms:
            set_statistics(self.network, self.exact, self.statistics, what="refine")
        graph, losses = self.network.trace.graph, []
        for task, teacher in enumerate(teachers):
            found = []
            batches = _shared(self.apart[task].held).split(AT_A_TIME)
            for index, x in enumerate(read(self.images[task], batches)):
                lesson = self.lessons.get((task, index)) or teacher(x)
                if self.keeps:
                    self.lessons[task, index] = lesson
                values = values_at(self.network, graph, x, teacher.names)
                found.append(teacher.losses(values, lesson).double())
            losses.append(torch.cat(ranks.said_by_all(torch.cat(found).cpu())))
        return Look(step, tuple(losses))


def _shared(indices: Tensor) -> Tensor:
    """Those of this rank."""
    return indices[ranks.share(len(indices))]


def read(images: Images, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Images by their indices; those that are decoded as they are used are read one batch ahead."""
    yield from (x for _, x in ahead(images, batches))
