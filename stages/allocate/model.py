"""The cost of a merged network as a function of how many units each group keeps separate.

With s_g separate units of d_g in group g and N networks, every kind of cost is

    cost(s) = base + sum_g linear_g s_g - sum_(i,o) product_io s_i s_o + sum_c copied_c (copies_c(s) - 1),

because a linear map from group i to group o has (d_o - s_o) rows that read d_i + (N - 1) s_i inputs and N s_o rows
that read d_i, and the parameters of a linear map over positions are there once for each owner of the units it acts
on: one copy for shared units, N for separate ones. All numbers are integers, and cost(d) = N * base. In a dense network
all d_o + (N - 1) s_o rows read all inputs: products are negative there, as they add to the cost, and cost(d) is up to
N^2 * base.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stages.core.graph.nodes import oriented
from stages.core.graph.trace import Trace
from stages.core.merged.cost import copied, counted_nodes, entry_cost
from stages.core.units.groups import PermutationGroup, State


@dataclass(frozen=True)
class CostModel:
    """sizes: d of each free group. base: cost of one source. linear, product: the coefficients above.

    copied: what a copy costs, and the groups whose units have one; an empty name for units that are always shared.
    levels: of each group the numbers of separate units that are allowed, rising from 0 to d; any if not named.
    """

    sizes: Mapping[str, int]
    base: int
    linear: Mapping[str, int]
    product: Mapping[tuple[str, str], int]
    copied: Sequence[tuple[int, tuple[str, ...]]] = ()
    networks: int = 2
    levels: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def allowed(self, group: str) -> Sequence[int]:
        """Numbers of separate units of a group, rising from 0 to d."""
        return self.levels.get(group) or range(self.sizes[group] + 1)

    @property
    def whole(self) -> int:
        """Cost of everything separate."""
        return self.cost(self.sizes)

    def cost(self, separate: Mapping[str, int]) -> int:
        """Exact cost of a split with ``separate`` units in each group."""
        total = self.base + sum(self.linear[g] * separate[g] for g in self.sizes)
        total -= sum(q * separate[i] * separate[o] for (i, o), q in self.product.items())
        return total + self._copies(separate)

    def step(self, separate: Mapping[str, int], group: str) -> int:
        """What one more separate unit of ``group`` costs."""
        change = self.linear[group]
        for (i, o), q in self.product.items():
            if i == o == group:
                change -= q * (2 * separate[group] + 1)
            elif group in (i, o):
                change -= q * separate[o if group == i else i]
        if self.copied:
            change += self._copies({**separate, group: separate[group] + 1}) - self._copies(separate)
        return change

    def _copies(self, separate: Mapping[str, int]) -> int:
        """What the copies cost beside those of one source."""
        total = 0
        for each, groups in self.copied:
            apart = any(separate.get(g, 0) for g in groups)
            shared = any(separate.get(g, 0) < self.sizes.get(g, 1) for g in groups)
            total += each * (shared + self.networks * apart - 1)
        return total

    @property
    def most_copied(self) -> int:
        """The most that copies cost in any split."""
        return self.networks * sum(each for each, _ in self.copied)


def cost_model(
    trace: Trace, state: State, labels: str, kind: str, networks: int, dense: bool = False, multiple: int = 1
) -> CostModel:
    """Coefficients of one architecture; kind: macs or parameters. multiple: see ``even_levels``."""
    free = trace.spec.free
    linear, product, base = dict.fromkeys(free, 0), {}, 0
    extra, saved = networks - 1, -((networks - 1) ** 2) if dense else networks - 1
    sizes = {name: group.size for name, group in free.items()}
    copies: list[tuple[int, tuple[str, ...]]] = []
    for node in counted_nodes(trace, labels):
        out = trace.layouts[node.name]
        if node.linear:
            weight = oriented(node, state[node.parameters["weight"]])
            scale = (trace.positions(node) if kind == "macs" else 1) * weight[0, 0].numel()
            d_out, d_in = weight.shape[:2]
            base += scale * d_out * d_in
            written = out.blocks(sizes)
            for o, block in written.items():
                linear[o] += extra * scale * d_in * block
            for i, block in trace.layouts[node.inputs[0]].blocks(sizes).items():
                linear[i] += extra * scale * d_out * block
                for o, other in written.items():
                    product[i, o] = product.get((i, o), 0) + saved * scale * block * other
        once = copied(trace, state, node, kind)
        if once:
            base += once
            held = tuple(dict.fromkeys(s.group if s.group in sizes else "" for s in out.segments))
            copies.append((once, held))
        each = entry_cost(trace, state, node, kind)
        base += each * out.width
        for name, block in out.blocks(sizes).items():
            linear[name] += extra * each * block
    even = {name: even_levels(group, networks, multiple) for name, group in free.items() if multiple > 1}
    return CostModel(sizes, base, linear, product, copies, networks, even)


def even_levels(group: PermutationGroup, networks: int, multiple: int) -> list[int]:
    """Numbers s of separate units with merged widths d + (N - 1) s that are multiples, in entries of an axis.

    A unit may be several entries wide (an attention head). Nothing and everything separate are always allowed.
    """
    block = math.gcd(*(span.block for span in group.spans))
    width = lambda s: (group.size + (networks - 1) * s) * block  # noqa: E731
    return [s for s in range(group.size + 1) if s in (0, group.size) or width(s) % multiple == 0]
