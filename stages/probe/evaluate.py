"""Accuracies of one candidate, a merged network or a combination of the sources, on every task's test images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.core.network import MergedNetwork, Source


class Candidate(Protocol):
    """What can be probed. ``task`` is an index; images are preprocessed, (n, c, h, w)."""

    def own(self, x: Tensor, task: int) -> Tensor:
        """Logits of one task's classes."""
        ...

    def joint(self, x: Tensor, task: int) -> Tensor:
        """Logits of all tasks' classes, side by side."""
        ...

    def features(self, x: Tensor, task: int) -> Tensor:
        """What the heads read, (n, features)."""
        ...


@dataclass(frozen=True)
class Merged:
    """A merged network as it is used."""

    network: MergedNetwork

    def own(self, x: Tensor, task: int) -> Tensor:
        return self.network(x, self._name(task))

    def joint(self, x: Tensor, task: int) -> Tensor:
        return self.network(x)

    def features(self, x: Tensor, task: int) -> Tensor:
        return self.network.features(x, self._name(task) if self.network.corrected else None).flatten(1)

    def _name(self, task: int) -> str | None:
        told = self.network.labels == "separate" or self.network.corrected
        return self.network.tasks[task].name if told else None


@dataclass(frozen=True)
class Ensemble:
    """All sources at once: the mean of their logits, or their heads side by side."""

    sources: Sequence[Source]
    labels: str

    def own(self, x: Tensor, task: int) -> Tensor:
        if self.labels == "shared":
            return torch.stack([source(x) for source in self.sources]).mean(0)
        return self.sources[task](x)

    def joint(self, x: Tensor, task: int) -> Tensor:
        return torch.cat([source(x) for source in self.sources], 1)

    def features(self, x: Tensor, task: int) -> Tensor:
        return torch.cat([source.features(x).flatten(1) for source in self.sources], 1)


@dataclass(frozen=True)
class Oracle:
    """Each source on its own task: somebody says which."""

    sources: Sequence[Source]

    def own(self, x: Tensor, task: int) -> Tensor:
        return self.sources[task](x)

    def joint(self, x: Tensor, task: int) -> Tensor:
        widths = [len(source.task.classes) for source in self.sources]
        whole = x.new_full((len(x), sum(widths)), -torch.inf)
        start = sum(widths[:task])
        whole[:, start : start + widths[task]] = self.sources[task](x)
        return whole

    def features(self, x: Tensor, task: int) -> Tensor:
        return self.sources[task].features(x).flatten(1)


@torch.no_grad()
def accuracy(
    candidate: Candidate, batches: Iterable[Tensor], labels: Tensor, task: int, offset: int | None = None
) -> float:
    """Percent right on one task. offset: where the task's classes start in the joint logits; None: own logits."""
    right = start = 0
    for x in batches:
        logits = candidate.own(x, task) if offset is None else candidate.joint(x, task)
        answer = logits.argmax(1).cpu() - (offset or 0)
        right += int((answer == labels[start : start + len(x)]).sum())
        start += len(x)
    return 100.0 * right / start


@torch.no_grad()
def extract(candidate: Candidate, batches: Iterable[Tensor], task: int) -> Tensor:
    """Features of all images, once: float32 (n, features) on the CPU."""
    return torch.cat([candidate.features(x, task).float().cpu() for x in batches])


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, penalty: float) -> float:
    """Percent right of a multinomial logistic regression on standardised features.

    train (n, d), labels (n,), test (m, d), truth (m,). penalty: weight of |W|^2 / 2 beside the mean loss.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = LogisticRegression(C=1 / (penalty * len(train)), max_iter=1000)
    probe = make_pipeline(StandardScaler(), model).fit(train.numpy(), labels.numpy())
    return 100.0 * float(probe.score(test.numpy(), truth.numpy()))


def evaluate(
    candidate: Candidate,
    images: Mapping[str, Sequence[tuple[Iterable[Tensor], Tensor]]],
    tasks: Sequence[tuple[str, int]],
    separate: bool,
    penalty: float,
) -> dict[str, dict[str, float]]:
    """{task: {accuracy, joint (separate label spaces only), probe}}, percent.

    images: {train, test: for each task (preprocessed batches, labels)}. tasks: (name, number of classes).
    """
    found, offset = {}, 0
    for task, (name, classes) in enumerate(tasks):
        (train, known), (test, truth) = images["train"][task], images["test"][task]
        scores = {"accuracy": accuracy(candidate, test, truth, task)}
        if separate:
            scores["joint"] = accuracy(candidate, test, truth, task, offset)
        features = extract(candidate, train, task), extract(candidate, test, task)
        scores["probe"] = linear_probe(features[0], known, features[1], truth, penalty)
        found[name] = {key: round(value, 4) for key, value in scores.items()}
        offset += classes
    return found
