"""Joint moments of the networks' features, task by task and pooled, and the similarities that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stages.core.runtime.errors import InputError
from stages.core.units.groups import PermutationSpec
from stages.core.units.matching import inside_order

Similarity = Literal["inner", "distance", "correlation"]
Origin = Literal["own", "proxy"]
POINTS = ("after", "before", "inside")


@dataclass(frozen=True)
class TaskMoments:
    """Of one group, n units of all networks side by side, over the images of each of T tasks.

    mean (T, n), second (T, n, n), both float64. A proxy's images are one more entry behind the tasks'.
    """

    mean: Tensor
    second: Tensor


Gathered = Mapping[str, Mapping[str, TaskMoments]]
"""{point: {group: TaskMoments}}: `after` is what the layers that read a group see, `before` the same in front of
the non-linearity; `inside` is `after` unit by unit for groups whose units are parts with units of their own, by the
names of ``PermutationSpec.contents``."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of n units of one group: mean (n,), second (n, n).

    sizes: how many of the units, side by side, are each network's.
    """

    mean: Tensor
    second: Tensor
    sizes: tuple[int, ...]

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)

    def block(self, whole: Tensor, row: int, column: int) -> Tensor:
        """The part of an (n, n) matrix that pairs units of one network (rows) with those of another (columns)."""
        return whole.split(self.sizes, 0)[row].split(self.sizes, 1)[column]

    def select(self, units: Sequence[Tensor]) -> "Moments":
        """Moments of some units of each network, in the order given. units: for each network int64 (k_m,)."""
        starts = torch.tensor([0, *self.sizes]).cumsum(0)[:-1]
        index = torch.cat([own + start for own, start in zip(units, starts, strict=True)])
        return Moments(self.mean[index], self.second[index][:, index], tuple(len(own) for own in units))

    def similarity(self, kind: Similarity) -> Tensor:
        """All pairs of units, (n, n); larger is more alike.

        inner: E[a b]. distance: minus E[(a - b)^2]. correlation: Pearson's, 0 where a unit is constant.
        """
        if kind == "inner":
            return self.second
        if kind == "distance":
            energy = self.second.diagonal()
            return 2 * self.second - energy[:, None] - energy[None, :]
        covariance = self.covariance
        variance = covariance.diagonal().clamp(min=0)
        tiny = 1e-12 * self.second.diagonal().clamp(min=1e-300)
        scale = torch.where(variance > tiny, variance.clamp(min=1e-300).rsqrt(), 0.0)
        return covariance * scale[:, None] * scale[None, :]

    def between(self, kind: Similarity) -> Tensor:
        """The same for N networks of d units each as (N, N, d, d): [m, l, i, j] is unit i of m with unit j of l."""
        networks, d = len(self.sizes), self.sizes[0]
        return self.similarity(kind).view(networks, d, networks, d).transpose(1, 2)


@dataclass(frozen=True)
class Statistics:
    """Moments of every free group, pooled over the images of all tasks, which weigh alike, or over the proxy's.

    after, before: the units of a group; entries of a part count as if they lay alike in all networks. inside: the
    units inside parts, one by one.
    """

    after: Mapping[str, Moments]
    before: Mapping[str, Moments]
    inside: Mapping[str, Moments] = field(default_factory=dict)

    def between(self, spec: PermutationSpec, name: str, kind: Similarity) -> dict[str, Tensor]:
        """Similarities of what a group consists of: {what: (N, N, parts * size, parts * size)}, see ``contents``.

        What no layer reads or writes (learned queries, mapped) was not looked at: nothing is like anything there.
        """
        found, networks = {}, len(next(iter(self.after.values())).sizes)
        for inner in spec.contents(name):
            own = self.inside.get(inner.name, self.after.get(inner.name))
            entries = inner.parts * inner.size
            zeros = (networks, networks, entries, entries)
            found[inner.name] = torch.zeros(zeros).double() if own is None else own.between(kind)
        return found

    def matched(self, spec: PermutationSpec, units: Mapping[str, Tensor], name: str) -> Tensor:
        """Correlation of matched units of every two networks, (N, N, d); of parts the mean of what they hold."""
        alike, found = self.between(spec, name, "correlation"), []
        for inner in spec.contents(name):
            networks = range(len(alike[inner.name]))
            orders = [inside_order(units, inner, m) for m in networks]
            pairs = [alike[inner.name][m, n][orders[m], orders[n]] for m in networks for n in networks]
            found.append(torch.stack(pairs).view(len(networks), len(networks), inner.parts, inner.size))
        return torch.cat(found, -1).mean(-1)


def pool(gathered: Gathered, networks: int, tasks: int, data: Origin = "own") -> Statistics:
    """Pool the moments of N ``networks`` of equal width over the tasks, or take the proxy's.

    Raises InputError when the proxy's are asked for and not there.
    """
    return Statistics(
        **{
            point: {group: _pooled(own, networks, tasks, data) for group, own in gathered[point].items()}
            for point in POINTS
        }
    )


def _pooled(own: TaskMoments, networks: int, tasks: int, data: Origin) -> Moments:
    mean, second = own.mean.cpu(), own.second.cpu()
    if data == "own":
        mean, second = mean[:tasks].mean(0), second[:tasks].mean(0)
    elif len(mean) == tasks:
        raise InputError("data: found proxy; allowed here: own, no proxy images were seen")
    else:
        mean, second = mean[tasks], second[tasks]
    return Moments(mean, second, (len(mean) // networks,) * networks)


def to_tensors(gathered: Gathered) -> dict[str, Tensor]:
    """As a file holds them: {point/group/part: tensor}."""
    return {
        f"{point}/{group}/{part}": getattr(own, part)
        for point, groups in gathered.items()
        for group, own in groups.items()
        for part in ("mean", "second")
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, TaskMoments]]:
    """The inverse of ``to_tensors``."""
    gathered: dict[str, dict[str, TaskMoments]] = {point: {} for point in POINTS}
    for name in tensors:
        point, _, rest = name.partition("/")
        group, _, part = rest.rpartition("/")
        if part == "mean":
            gathered[point][group] = TaskMoments(tensors[name], tensors[f"{point}/{group}/second"])
    return gathered
