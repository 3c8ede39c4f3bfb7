"""A merged network whose weights are functions of few parameters: W = M diag(W_1, ..., W_N) U.

Kinderman et al. 2025, FS-Merge. Every linear map has matrices of its own: M (d_out, N d_out) mixes what the N networks
give, U (N d_in, d_in) says what each of them reads, both diagonal plus low rank, and W is what they multiply out to, so
that the network is an ordinary one. The images are read as they are. At the start M is the first network's identity and
U an identity for each network: the function is the first network's. Parameters that work unit by unit are mixed by a
diagonal alone; a batch norm that alone reads a linear map is part of it.

Units that stay separate are their network's own rows, which read through its U; those that read nothing but copies are
copies.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.core.graph.folding import norm_scale
from stages.core.graph.nodes import COPIED, Node, node_parameters, oriented
from stages.core.merged.network import MergedNetwork
from stages.core.units.groups import State
from stages.fit.average import average_block, average_vector
from stages.fit.setup import Setup


class Factor(nn.Module):
    """N matrices diag(diagonal_m) + common own_m^T, (d, d) each; the low rank is zero at the start.

    diagonal (N, d), common (d, rank), own (N, d, rank). As they stand side by side they are M; transposed, above each
    other, U.
    """

    def __init__(self, diagonal: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        networks, d = diagonal.shape
        self.diagonal = nn.Parameter(diagonal)
        drawn = torch.randn(d, min(rank, d), generator=generator) * d**-0.5
        self.common = nn.Parameter(drawn.to(diagonal))
        self.own = nn.Parameter(diagonal.new_zeros(networks, *drawn.shape))

    def times(self, network: int, x: Tensor) -> Tensor:
        """One of them on x (d, ...)."""
        flat = x.flatten(1)
        mixed = self.common @ (self.own[network].T @ flat)
        return (self.diagonal[network][:, None] * flat + mixed).view_as(x)

    def after(self, network: int, x: Tensor) -> Tensor:
        """x (..., d) on one of them."""
        return x * self.diagonal[network] + (x @ self.common) @ self.own[network].T


class Supernet(nn.Module):
    """M and U of every layer of ``setup.network``, its trained parameters; ``tensors`` multiplies them out."""

    def __init__(self, setup: Setup, rank: int) -> None:
        """The network is the average of the sources; its batch norms get statistics under which they only shift."""
        super().__init__()
        self.setup, self.rank = setup, rank
        self.mixes, self.reads, self.scales = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        self._names = {id(own): name for name, own in self.network.named_parameters()}
        self._before = {name: own.detach().clone() for name, own in self.network.named_parameters()}
        self._norms = {norm.name: name for name, norm in setup.norms.items() if "weight" in norm.parameters}
        for node in self.network.trace.graph.nodes:
            if node.linear:
                self._start_linear(node)
            elif node.parameters:
                self._start_units(node)

    @property
    def network(self) -> MergedNetwork:
        """No part of this module: its weights are not trained."""
        return self.setup.network

    @property
    def networks(self) -> int:
        return self.network.networks

    def _states(self, node: Node) -> list[dict[str, Tensor]]:
        return [node_parameters(node, source.state) for source in self.setup.sources]

    def _mixed(self, node: Node, network: int) -> Tensor:
        """Which of a network's entries of a value are shared: bool (d,)."""
        parts = self.network.arrangement(node.name)
        return (parts.owner < 0)[parts.positions[network]].to(self._like.device)

    @property
    def _like(self) -> Tensor:
        return next(iter(self.setup.sources[0].state.values()))

    def _first(self, d: int, every: bool = False) -> Tensor:
        """(N, d): ones of the first network, or of every one."""
        found = next(self.network.parameters()).new_zeros(self.networks, d)
        found[: None if every else 1] = 1
        return found

    def _start_linear(self, node: Node) -> None:
        weight = oriented(node, self._states(node)[0]["weight"])
        key, generator = _key(node), self.setup.generator
        exact = self.setup.exact[node.name]
        if not bool(exact.all()):
            trace = self.network.trace
            if any(s.group in trace.spec.free for s in trace.layouts[node.inputs[0]].segments):
                ones = self._first(weight.shape[1], every=True)
                self.reads[key] = Factor(ones, self.rank, generator)
            if bool(self._mixed(node, 0).any()):
                self.mixes[key] = Factor(self._first(len(weight)), self.rank, generator)

    def _start_units(self, node: Node) -> None:
        if node.operation == "batch_norm":
            self._still(node)
        if node.name not in self._norms and (node.operation in COPIED or bool(self._mixed(node, 0).any())):
            for role, size in self._unit_roles(node):
                self.scales[f"{_key(node)}{role}"] = nn.Parameter(self._first(size))

    def _unit_roles(self, node: Node) -> list[tuple[str, int]]:
        """Trained roles of a node whose parameters work unit by unit, and their entries."""
        roles = [role for role in node.parameters if not role.startswith("running")]
        if node.operation in COPIED:
            return [(role, self._states(node)[0][role].shape[0]) for role in roles]
        return [(role, self.network.trace.layouts[node.name].width) for role in roles]

    @torch.no_grad()
    def _still(self, node: Node) -> None:
        """Statistics of a batch norm that are not a source's: mean 0 and variance 1, or without scale the first's."""
        norm, exact = self.network.map_of(node), self.setup.exact[node.name].to(self._like.device)
        if norm.affine:
            mean, variance = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
        else:
            mean, variance = (
                self._placed(
                    node, [s[role] for s in self._states(node)], self._first(len(self._mixed(node, 0)))
                )
                for role in ("running_mean", "running_var")
            )
        norm.running_mean.copy_(torch.where(exact, norm.running_mean, mean))
        norm.running_var.copy_(torch.where(exact, norm.running_var, variance))

    # -- multiplied out -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter of the network by its name."""
        found = dict[str, Tensor]()
        for node in self.network.trace.graph.nodes:
            if node.linear:
                found |= self._linear(node)
            elif node.operation == "batch_norm":
                if node.name not in self._norms:
                    found |= self._norm(node, *self._apart(node))
            elif node.operation in COPIED:
                found |= self._copies(node)
            elif node.parameters:
                module = self.network.map_of(node)
                for role, _ in self._unit_roles(node):
                    parameter = getattr(module, role)
                    found[self._names[id(parameter)]] = self._units(node, role)
        return found

    def _linear(self, node: Node) -> dict[str, Tensor]:
        module, states = self.network.map_of(node), self._states(node)
        norm = self.setup.norms.get(node.name)
        folded = norm is not None and norm.name in self._norms
        weights, shifts, found = [], [], dict[str, Tensor]()
        for m, state in enumerate(states):
            raw = oriented(node, state["weight"]).detach()
            weight, shift = raw, state["bias"].detach() if "bias" in state else None
            if folded:
                scale, moved = _affine(norm, self.setup.sources[m].state)
                weight = raw * scale.view(-1, *[1] * (raw.dim() - 1))
                shift = moved + (0 if shift is None else shift * scale)
            weights.append(self._multiplied(node, m, weight, raw))
            shifts.append(None if shift is None else self._mix(node, m, shift))
        whole = [weight.new_ones(len(weight)) for weight in weights]
        for block, parameter in zip(module.blocks, module.weights, strict=True):
            found[self._names[id(parameter)]] = average_block(
                weights, block, module.inputs, module.outputs, whole
            )
        shift = None if shifts[0] is None else average_vector(shifts, module.outputs, whole)
        if folded:
            found |= self._norm(norm, torch.ones_like(shift), shift)
            shift = torch.zeros_like(shift)
        if module.bias is not None:
            found[self._names[id(module.bias)]] = self._kept(node, module.bias, shift)
        return found

    def _multiplied(self, node: Node, network: int, weight: Tensor, raw: Tensor) -> Tensor:
        """M_m W_m U_m in the rows that are shared, W_m U_m in the others, a copy where all it reads are copies."""
        key = _key(node)
        if key not in self.reads and key not in self.mixes:
            return raw
        positions = self.network.arrangement(node.name).positions[network]
        exact = self.setup.exact[node.name][positions].to(weight.device)
        if key in self.reads:
            weight = self.reads[key].times(network, weight.transpose(0, 1)).transpose(0, 1)
        weight = self._mix(node, network, weight)
        return torch.where(exact.view(-1, *[1] * (raw.dim() - 1)), raw, weight)

    def _mix(self, node: Node, network: int, value: Tensor) -> Tensor:
        """M_m on what a network gives, (d_out, ...), in the rows that are shared."""
        key = _key(node)
        if key not in self.mixes:
            return value
        rows = self._mixed(node, network).view(-1, *[1] * (value.dim() - 1))
        mixed = self.mixes[key].times(network, value if value.dim() > 1 else value[:, None])
        return torch.where(rows, mixed.view_as(value), value)

    def _norm(self, node: Node, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Parameters of a batch norm that scales and shifts so. Without any of its own there are none."""
        norm = self.network.map_of(node)
        if not norm.affine:
            return {}
        weight = scale * (norm.running_var + norm.eps).sqrt()
        bias = shift + norm.running_mean * scale
        return {
            self._names[id(norm.weight)]: self._kept(node, norm.weight, weight),
            self._names[id(norm.bias)]: self._kept(node, norm.bias, bias),
        }

    def _apart(self, node: Node) -> tuple[Tensor, Tensor]:
        """Scale and shift of a batch norm that is no part of a linear map."""
        own = [_affine(node, source.state) for source in self.setup.sources]
        if "weight" not in node.parameters:
            return own[0]
        pairs = zip(("weight", "bias"), zip(*own, strict=True), strict=True)
        scale, shift = (
            self._placed(node, values, self.scales.get(f"{_key(node)}{role}")) for role, values in pairs
        )
        return scale, shift

    def _units(self, node: Node, role: str) -> Tensor:
        network, parts = self.network, self.network.arrangement(node.name)
        values = [
            network.trace.widened(node, role, state[role], len(own))
            for state, own in zip(self._states(node), parts.positions, strict=True)
        ]
        scales = self.scales.get(f"{_key(node)}{role}")
        return self._placed(node, values, scales, network.trace.unit_dim(node, role))

    def _placed(self, node: Node, values: Sequence[Tensor], scales: Tensor | None, dim: int = 0) -> Tensor:
        """Entries of all networks in merged order; shared ones the sum, each times its scale (N, d)."""
        shares = []
        for m, value in enumerate(values):
            rows = self._mixed(node, m)
            one = value.new_ones(len(rows))
            shares.append(one if scales is None else torch.where(rows, scales[m], one))
        return average_vector([v.detach() for v in values], self.network.arrangement(node.name), shares, dim)

    def _copies(self, node: Node) -> dict[str, Tensor]:
        """A linear map beside the units: the copy of shared ones is the sum, each row times its scale."""
        module, states, found = self.network.map_of(node), self._states(node), dict[str, Tensor]()
        for role, _ in self._unit_roles(node):
            parameter, scales = getattr(module, role), self.scales[f"{_key(node)}{role}"]
            own = [state[role].detach() for state in states]
            shared = sum(s.view(-1, *[1] * (t.dim() - 1)) * t for s, t in zip(scales, own, strict=True))
            each = [shared if owner < 0 else own[owner] for owner in module.owners]
            found[self._names[id(parameter)]] = torch.stack(each)
        return found

    def _kept(self, node: Node, parameter: Tensor, value: Tensor) -> Tensor:
        """A vector over merged entries, with copies of a source's as they were."""
        exact = self.setup.exact[node.name].to(value.device)
        return torch.where(exact, self._before[self._names[id(parameter)]], value)


def _affine(norm: Node, state: State) -> tuple[Tensor, Tensor]:
    """Scale and shift of a source's batch norm, (d,) each."""
    own, scale = node_parameters(norm, state), norm_scale(norm, state).detach()
    shift = -own["running_mean"] * scale
    return scale, shift + (own["bias"].detach() if "bias" in own else 0)


def _key(node: Node) -> str:
    return f"{node.name}_"
