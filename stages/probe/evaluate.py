"""Accuracies of one candidate, a merged network or a combination of the sources, on every task's test images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.core.graph.nodes import Graph
from stages.core.graph.source import Source
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.errors import InputError


class Candidate(Protocol):
    """What can be probed."""

    def run(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and what the heads read, (n, features), of preprocessed images of one task, an index.

        With separate label spaces the logits are those of all tasks' classes, side by side.
        """
        ...


@dataclass(frozen=True)
class OneForAll:
    """A merged network as it is used."""

    network: MergedNetwork

    def run(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        network = self.network
        if not network.corrected:
            features = network.features(x)
            return network.logits(features), _flat(features, network.trace.graph, len(x))
        if network.labels == "shared":
            features = network.features(x, network.tasks[task].name)
            return network.logits(features, task), _flat(features, network.trace.graph, len(x))
        # each head reads what its own task's corrections give
        each = [network.features(x, own.name) for own in network.tasks]
        logits = [network.logits(features, index) for index, features in enumerate(each)]
        return torch.cat(logits, 1), _flat(each[task], network.trace.graph, len(x))


@dataclass(frozen=True)
class Ensemble:
    """All sources at once: the mean of their logits, or their heads side by side."""

    sources: Sequence[Source]
    labels: str

    def run(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        logits, features = zip(*(_run(source, x) for source in self.sources), strict=True)
        joined = torch.cat(logits, 1) if self.labels == "separate" else torch.stack(logits).mean(0)
        return joined, torch.cat(features, 1)


@dataclass(frozen=True)
class Oracle:
    """Each source on its own task: somebody says which."""

    sources: Sequence[Source]
    labels: str

    def run(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        logits, features = _run(self.sources[task], x)
        if self.labels == "shared":
            return logits, features
        widths = [len(source.task.classes) for source in self.sources]
        others = [logits.new_full((len(x), width), -torch.inf) for width in widths]
        others[task] = logits
        return torch.cat(others, 1), features


def _run(source: Source, x: Tensor) -> tuple[Tensor, Tensor]:
    features = source.features(x)
    return source.logits(features), _flat(features, source.graph, len(x))


def _flat(features: Tensor, graph: Graph, images: int) -> Tensor:
    """(n, features). Of maps that a convolution reads as head, means over places; of frames, all of an image."""
    maps = graph.head is not None and graph.head.operation != "linear"
    return (features.flatten(2).mean(2) if maps else features).reshape(images, -1)


@torch.no_grad()
def collect(candidate: Candidate, batches: Iterable[Tensor], task: int) -> tuple[Tensor, Tensor]:
    """Logits and features of all images, in one pass: float32 on the CPU."""
    pairs = (candidate.run(x, task) for x in batches)
    logits, features = zip(*((a.float().cpu(), b.float().cpu()) for a, b in pairs), strict=True)
    return torch.cat(logits), torch.cat(features)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows whose largest logit is the label's."""
    return 100.0 * int((logits.argmax(1) == labels).sum()) / len(labels)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, penalty: float) -> float:
    """Percent right of a multinomial logistic regression on standardised features.

    train (n, d), labels (n,), test (m, d), truth (m,). penalty: weight of |W|^2 / 2 beside the mean loss.
    Raises InputError for images of one class.
    """
    if len(found := labels.unique()) < 2:
        raise InputError(
            f"probe.linear_images: the {len(train)} images are all of class {int(found[0])}; allowed: so many that "
            "there are two classes"
        )
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
        logits, features = collect(candidate, test, task)
        own = logits[:, offset : offset + classes] if separate else logits
        scores = {"accuracy": accuracy(own, truth)}
        if separate:
            scores["joint"] = accuracy(logits, truth + offset)
        scores["probe"] = linear_probe(collect(candidate, train, task)[1], known, features, truth, penalty)
        found[name] = {key: round(value, 4) for key, value in scores.items()}
        offset += classes
    return found
