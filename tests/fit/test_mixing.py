"""Linear maps over positions: what is a unit there, who reads which copy, and what the shared one is fitted to."""

import copy

import pytest
import torch
from styles import STYLES, Gated, Mixer, PatchConv, ResMlp
from torch import nn

from stages.api import merge
from stages.core.graph.source import Source, Task
from stages.core.merged.cost import built_cost, source_cost
from stages.core.merged.mixed import MixMap
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import Batch
from stages.core.tracing.trace import trace
from stages.core.units.groups import permute
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network

SIDE = STYLES["mlp-mixer"][1]


def made(kind, seed):
    torch.manual_seed(seed)
    return kind().double().eval()


@pytest.fixture
def x():
    return torch.randn(8, *SIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_hidden_positions_have_an_order_of_their_own_and_are_never_separate(x):
    spec = trace(made(Mixer, 0), x).spec
    assert {name: group.size for name, group in spec.free.items()} == {"stem": 6, "channels.1": 9}
    (inner,) = spec.inner.values()
    assert (inner.parts, inner.size) == (1, 5)
    assert spec.groups[inner.outer].fixed
    places = {"tokens.0.weight[0]", "tokens.0.bias[0]", "tokens.2.weight[1]"}
    assert {str(span.axis) for span in inner.spans} == places
    assert not trace(made(ResMlp, 0), x).spec.inner
    assert not trace(made(Gated, 0), x).spec.inner


@pytest.mark.parametrize("kind", [Mixer, PatchConv])
@pytest.mark.parametrize("by", ["weights", "activations", "dual"])
@torch.no_grad()
def test_the_order_of_hidden_positions_is_found(kind, by, x):
    first, generator = made(kind, 0), torch.Generator().manual_seed(1)
    spec = trace(first, x).spec
    orders = {name: torch.randperm(group.size, generator=generator) for name, group in spec.free.items()}
    orders |= {n: torch.randperm(i.size, generator=generator)[None] for n, i in spec.inner.items()}
    second = copy.deepcopy(first)
    second.load_state_dict(permute(first.state_dict(), spec, orders))
    torch.testing.assert_close(second(x), first(x))
    images = {"a": [x[:4]], "b": [x[4:]]}
    found = merge(
        {"a": first, "b": second},
        images,
        1.0,
        {"match": {"by": by}, "fit": {"solver": "average"}},
        progress=False,
    )
    torch.testing.assert_close(found(x), first(x), rtol=1e-8, atol=1e-8)


KEPT = [0, 2, 3, 5]  # units of the stream that are shared


def built(x, fit):
    """Two networks, merged by position with a part of their units shared."""
    networks = [made(Mixer, seed) for seed in (0, 1)]
    traced = trace(networks[0], x)
    sources = [
        Source(traced, dict(net.state_dict()), Task(name, ("0", "1", "2")))
        for net, name in zip(networks, "ab", strict=True)
    ]
    batches = [Batch(x[:4], 0), Batch(x[4:], 1)]
    split = full_split(traced.spec, {"stem": KEPT, "channels.1": range(4)})
    matching = identity_matching(traced.spec, 2)
    return (
        networks,
        *fit_network(sources, matching, split, batches, fit, labels="shared", precision=torch.float64),
    )


@torch.no_grad()
def test_each_owner_reads_its_own_copy(x):
    networks, found, _ = built(x, Fit(solver="average"))
    node = next(n for n in found.trace.graph.nodes if n.operation == "mix")
    module, dim = found.map_of(node), node.attributes["dim"]
    assert isinstance(module, MixMap)
    assert module.owners == [-1, 0, 1]
    shape = list(found.trace.shapes[node.inputs[0]])
    shape[found.trace.layouts[node.name].dim] = module.outputs.width
    z = torch.randn(shape, dtype=torch.float64)
    given = module(z).movedim(dim, -1)
    weights = [net.tokens[0].weight for net in networks]
    biases = [net.tokens[0].bias for net in networks]
    for entry, owner in enumerate(module.outputs.owner.tolist()):
        weight = sum(weights) / 2 if owner < 0 else weights[owner]
        bias = sum(biases) / 2 if owner < 0 else biases[owner]
        row = z.movedim(dim, -1).select(module.dim, entry)
        torch.testing.assert_close(given.select(module.dim, entry), row @ weight.T + bias)


@torch.no_grad()
def test_the_shared_copy_is_the_least_squares_solution(x):
    fit = Fit(solver="exact", inputs="source", targets="own", norm="average", ridge=0.0)
    networks, found, record = built(x, fit)
    node = next(n for n in found.trace.graph.nodes if n.operation == "mix")
    module = found.map_of(node)
    rows, targets = [], []
    for part, network in zip((x[:4], x[4:]), networks, strict=True):
        z = network.norm(network.stem(part).flatten(2).mT).mT[:, KEPT]  # the owner's
        rows.append(z.reshape(-1, 16))
        targets.append(network.tokens[0](z).reshape(-1, 5))
    A = torch.cat([torch.cat(rows), torch.ones(sum(map(len, rows)), 1).double()], 1)
    wanted = torch.linalg.lstsq(A, torch.cat(targets)).solution.T
    at = module.owners.index(-1)
    torch.testing.assert_close(module.weight[at], wanted[:, :-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.bias[at], wanted[:, -1], rtol=1e-5, atol=1e-6)
    assert {"tokens.0", "tokens.2"} <= {line.layer for line in record}


@pytest.mark.parametrize("kind", [Mixer, ResMlp])
def test_a_budget_of_parameters_is_kept_with_every_copy_counted(kind, x):
    networks = {"a": made(kind, 0), "b": made(kind, 1)}
    images = {"a": [x[:4]], "b": [x[4:]]}
    traced = trace(networks["a"], x)
    own = source_cost(traced, networks["a"].state_dict(), "shared", "parameters")
    assert own == sum(p.numel() for p in networks["a"].parameters())
    for budget in (1.0, 1.3, 1.9, 2.0):
        found = merge(networks, images, budget, options={"allocate": {"cost": "parameters"}}, progress=False)
        assert built_cost(found, "parameters") <= budget * own
        assert built_cost(found, "parameters") == sum(p.numel() for p in found.parameters())
        if budget == 2.0:
            assert built_cost(found, "parameters") == 2 * own - 3  # the common head has one bias
            assert not any(found.shared.values())


class Over(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        self.stem, self.fc = nn.Conv1d(3, 4, 1), nn.Linear(4, 3)
        for name, module in modules.items():
            setattr(self, name, module)


class Halved(Over):
    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.one(torch.cat([x, x], 1).transpose(1, 2)).mean(1))


class OnImages(Over):
    def forward(self, x):
        return self.fc(self.stem(self.one(x)).mean(-1))


def test_what_cannot_be_mixed_is_refused():
    x = torch.randn(2, 3, 12)
    with pytest.raises(InputError, match="a convolution along units that gives 4 of them"):
        trace(Halved(one=nn.Conv1d(12, 12, 2, stride=2)), x)
    with pytest.raises(InputError, match="mean over the units"):
        trace(OnImages(one=nn.Linear(12, 10)), x)
