"""Alignments: what each network sees of a merged unit, and how it reads its own units out of merged ones.

A matching that is a permutation puts units side by side; whatever is done to the shared units beyond that is a pair of
matrices per network and group. With h_m the k shared units of network m,

    merged = sum_m weights[m] * (views[m] @ h_m),        h_m = unmerges[m] @ merged,

so that the merge matrix of network m is weights[m][:, None] * views[m]. A plain matching is views and unmerges of
identity matrices and weights of 1/N: the groups that an ``Alignment`` does not name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.core.graph.folding import exclusive_norms, fold
from stages.core.graph.layouts import Layout, Segment, shared_units
from stages.core.graph.nodes import oriented
from stages.core.graph.source import Source
from stages.core.runtime.errors import InputError


@dataclass(frozen=True)
class GroupAlignment:
    """Of one group with k shared units, float64.

    views: for each network (k, k_m); a zero row where it has no part in a merged unit. unmerges: (k_m, k).
    weights: (N, k), the share of each network in each merged unit; columns sum to 1. correlations: (k_m, k_m) of each
    network's own units.
    """

    views: tuple[Tensor, ...]
    unmerges: tuple[Tensor, ...]
    weights: Tensor
    correlations: tuple[Tensor, ...]


def clustered(cluster: Tensor, sizes: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Views, unmerges and weights of clusters of units, each of which is one merged unit: the mean of its units.

    cluster: int64 (n,), of all networks' units side by side, ``sizes`` of each; as many as one network has units.
    """
    indicator = torch.nn.functional.one_hot(cluster, sizes[0]).double()  # (n, k)
    unmerges = indicator.split(list(sizes))
    counts = torch.stack([own.sum(0) for own in unmerges])  # (N, k)
    views = tuple(own.T / own.sum(0).clamp(min=1)[:, None] for own in unmerges)
    return views, unmerges, counts / counts.sum(0)


@dataclass(frozen=True)
class Alignment:
    """Matrices of the groups whose shared units are more than matched pairs, for N ``networks``."""

    networks: int
    groups: Mapping[str, GroupAlignment] = field(default_factory=dict)

    def touches(self, layout: Layout) -> bool:
        """Whether a value or a parameter's dimension holds units of such a group."""
        return any(segment.group in self.groups for segment in layout.segments)

    def view(
        self, value: Tensor, layout: Layout, dim: int, shared: Mapping[str, int], network: int
    ) -> Tensor:
        """A network's value (units in merged order) with its shared units as merged ones.

        dim: where the units lie in ``value``. shared: k of each free group.
        """
        return self._mapped(value, layout, dim, shared, network, "views")

    def read(self, weight: Tensor, layout: Layout, shared: Mapping[str, int], network: int) -> Tensor:
        """A weight (d_out, d_in, ...) that reads a network's own units, as one that reads merged units."""
        return self._mapped(weight, layout, 1, shared, network, "unmerges")

    def _mapped(
        self, value: Tensor, layout: Layout, dim: int, shared: Mapping[str, int], network: int, which: str
    ) -> Tensor:
        if not self.touches(layout):
            return value
        mapped, start = [], 0
        for segment in layout.segments:
            part = value.narrow(dim, start, segment.size * segment.block)
            start += segment.size * segment.block
            found = self.groups.get(segment.group)
            if found is not None:
                k = _whole(segment, found, shared)
                own, rest = part.split([k * segment.block, (segment.size - k) * segment.block], dim)
                matrix = found.views[network] if which == "views" else found.unmerges[network].T
                part = torch.cat([_multiply(matrix, own, dim, segment.block), rest], dim)
            mapped.append(part)
        return torch.cat(mapped, dim)

    def shares(self, layout: Layout, shared: Mapping[str, int], like: Tensor) -> Tensor:
        """What each network counts for in its entries of a value: (N, d); 1 for separate units."""
        entries = []
        for segment in layout.segments:
            found = self.groups.get(segment.group)
            k = shared_units(segment, shared) if found is None else _whole(segment, found, shared)
            weights = like.new_full((self.networks, k), 1 / self.networks) if found is None else found.weights
            entries.append(weights.to(like).repeat_interleave(segment.block, 1))
            entries.append(like.new_ones(self.networks, (segment.size - k) * segment.block))
        return torch.cat(entries, 1)


def _whole(segment: Segment, found: GroupAlignment, shared: Mapping[str, int]) -> int:
    """The shared units of a segment that holds a whole group, as what mixes units needs it."""
    k = shared[segment.group]
    if segment.first or found.weights.shape[1] != k or segment.size < k:
        raise InputError(
            f"group {segment.group}: its units lie apart (a channel shuffle or a slice); allowed: a matching that is a "
            "permutation"
        )
    return k


def _multiply(matrix: Tensor, value: Tensor, dim: int, block: int) -> Tensor:
    """matrix (k', k) on the units of a value, each ``block`` entries wide along ``dim``."""
    matrix = matrix.to(value)
    value = value.movedim(dim, -1).unflatten(-1, (-1, block))  # (..., k, block)
    return (matrix @ value).flatten(-2).movedim(-1, dim)


def view_states(
    sources: Sequence[Source], alignment: Alignment, shared: Mapping[str, int]
) -> list[dict[str, Tensor]]:
    """Each source's tensors in merged units: W becomes view_out W unmerge_in, norm layers and biases view_out.

    sources: units in merged order. What mixes units does not commute with scaling them, so a batch norm that alone
    reads a linear map is folded into it first; its own scale then says how far the mixed units deviate, by the
    correlation of the network's units. Linear maps and batch norms are covered; raises InputError for another
    operation on a group of the alignment.
    """
    return [_view_state(source, alignment, shared, m) for m, source in enumerate(sources)]


def _view_state(
    source: Source, alignment: Alignment, shared: Mapping[str, int], network: int
) -> dict[str, Tensor]:
    state, layouts = dict(source.state), source.trace.layouts
    if not alignment.groups:
        return state
    norms, folded = exclusive_norms(source.graph), set[str]()
    for node in source.graph.nodes:
        out = layouts[node.name]
        view = lambda tensor, layout=out: alignment.view(tensor, layout, 0, shared, network)  # noqa: E731
        if node.linear:
            norm = norms.get(node.name)
            if norm is not None and "weight" in norm.parameters and alignment.touches(out):
                fold(state, node, norm)
                folded.add(norm.name)
            weight = alignment.read(
                oriented(node, state[node.parameters["weight"]]), layouts[node.inputs[0]], shared, network
            )
            state[node.parameters["weight"]] = oriented(node, view(weight))
            if "bias" in node.parameters:
                state[node.parameters["bias"]] = view(state[node.parameters["bias"]])
        elif not alignment.touches(out):
            continue
        elif node.operation == "batch_norm":
            variance = state[node.parameters["running_var"]]
            variance = _mixed_variance(variance, alignment, out, shared, network)
            for role in node.parameters:
                state[node.parameters[role]] = view(state[node.parameters[role]])
            state[node.parameters["running_var"]] = variance
            if node.name in folded:
                state[node.parameters["weight"]] = (variance + node.attributes["eps"]).sqrt()
        elif (
            node.parameters
            or "spread" in node.attributes
            or node.operation in ("attention", "matmul", "group_norm", "normalize")
        ):
            group = next(s.group for s in out.segments if s.group in alignment.groups)
            raise InputError(
                f"{node.name}: {node.operation} works on single units of group {group}; "
                "allowed: a matching that is a permutation"
            )
    return state


def _mixed_variance(
    variance: Tensor, alignment: Alignment, layout: Layout, shared: Mapping[str, int], network: int
) -> Tensor:
    """Variance of each unit of a view from that of the network's units and their correlation: diag(T D R D T^T)."""
    variances, start = [], 0
    for segment in layout.segments:
        part = variance.narrow(0, start, segment.size * segment.block)
        start += segment.size * segment.block
        found = alignment.groups.get(segment.group)
        if found is not None:
            k = shared[segment.group]
            own, rest = part.split([k * segment.block, (segment.size - k) * segment.block])
            deviation = own.double().sqrt().view(-1, segment.block)  # (k_m, block)
            R = found.correlations[network].to(deviation)
            T = found.views[network].to(deviation)
            mixed = torch.stack([((T * s) @ R * (T * s)).sum(1) for s in deviation.unbind(1)], 1).clamp(min=0)
            part = torch.cat([mixed.flatten().to(variance), rest])
        variances.append(part)
    return torch.cat(variances)
