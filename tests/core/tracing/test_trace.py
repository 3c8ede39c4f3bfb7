import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.core.graph.operations import run_graph
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify
from stages.core.units.groups import Axis, PermutationSpec, Span


def torchvision_network(name):
    import torchvision.models

    network = getattr(torchvision.models, name)(weights=None, num_classes=5)
    if name == "vgg11_bn":  # the published classifier has 120 million parameters
        network.classifier = nn.Sequential(nn.Linear(512 * 49, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5))
    return network


ZOO = {  # name: (side of the images, number of free groups)
    "resnet18": (64, 1 + 8 + 3),  # stem and first stage are one stream
    "resnet50": (32, 1 + 2 * 16 + 4),
    "vgg11_bn": (32, 8 + 1),
    "densenet121": (32, 1 + 2 * 58 + 3),
    "resnet": (16, 3 + 3),
}


@pytest.fixture(scope="module", params=ZOO)
def zoo(request, randomise):
    side, groups = ZOO[request.param]
    if request.param == "resnet":
        network = build("resnet", {"depth": 8, "width": 4, "classes": 5})
    else:
        network = torchvision_network(request.param)
    randomise(network, 0)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    return network, x, trace(network, x), groups


def permute_by_hand(state, spec, orders):
    """Every axis as a list of entries, written unit by unit."""
    lists = {}
    for name, order in orders.items():
        for span in spec.groups[name].spans:
            entries = lists.setdefault(
                span.axis, list(range(state[span.axis.parameter].shape[span.axis.dim]))
            )
            for j, unit in enumerate(order.tolist()):
                for i in range(span.block):
                    entries[span.start + j * span.block + i] = span.start + unit * span.block + i
    state = dict(state)
    for axis, entries in lists.items():
        state[axis.parameter] = state[axis.parameter].index_select(axis.dim, torch.tensor(entries))
    return state


@torch.no_grad()
def test_permuting_the_groups_leaves_the_outputs_alone(zoo):
    network, x, traced, groups = zoo
    free, expected = traced.spec.free, network(x)
    assert len(free) == groups
    generator = torch.Generator().manual_seed(1)
    orders = {name: torch.randperm(group.size, generator=generator) for name, group in free.items()}
    alone = [{name: order} for name, order in orders.items()] if groups <= 12 else []
    for some in [orders, *alone]:
        moved = permute_by_hand(network.state_dict(), traced.spec, some)
        found = torch.func.functional_call(network, moved, (x,))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        spans = [span for name in some for span in free[name].spans]
        assert not any(
            torch.equal(moved[p], network.state_dict()[p]) for p in {s.axis.parameter for s in spans}
        )


@torch.no_grad()
def test_the_graph_computes_what_the_network_does(zoo):
    network, x, traced, _ = zoo
    torch.testing.assert_close(
        run_graph(traced.graph, network.state_dict(), x), network(x), rtol=1e-10, atol=1e-10
    )


def test_every_entry_of_every_axis_belongs_to_one_group(zoo):
    network, _, traced, _ = zoo
    covered = {}
    for group in traced.spec.groups.values():
        for span in group.spans:
            entries = range(span.start, span.start + group.size * span.block)
            covered.setdefault(span.axis, []).extend(entries)
    for name, tensor in network.state_dict().items():
        for dim in range(min(tensor.dim(), 2)):
            axis = next(a for a in covered if (a.parameter, a.dim) == (name, dim))
            assert sorted(covered[axis]) == list(range(tensor.shape[dim])), axis


def test_verification_accepts_the_trace(zoo):
    network, x, traced, _ = zoo
    verify(network, traced, x)


# -- a wrong trace is caught --------------------------------------------------------------------------------------


def without(traced, name, index):
    group = traced.spec.groups[name]
    spans = group.spans[:index] + group.spans[index + 1 :]
    groups = {**traced.spec.groups, name: dataclasses.replace(group, spans=spans)}
    return dataclasses.replace(traced, spec=PermutationSpec(groups))


@pytest.mark.parametrize("kind", ["small", "resnet"])
def test_a_missing_span_is_caught_and_its_group_named(kind, small, images, randomise):
    if kind == "small":
        network, x = small(), images(2)
    else:  # two units a group: every unit must move for this to be seen
        network, x = (
            randomise(build("resnet", {"depth": 8, "width": 2, "classes": 3}), 0),
            torch.rand(2, 3, 8, 8),
        )
    traced = trace(network, x)
    for name, group in traced.spec.free.items():
        for index in range(len(group.spans)):
            with pytest.raises(InputError, match=f"group {name}:"):
                verify(network, without(traced, name, index), x)


def test_a_branch_that_is_switched_off_hides_no_error(small, images):
    network = small()
    nn.init.zeros_(network.bn2.weight)
    nn.init.zeros_(network.bn2.bias)
    traced = trace(network, images(2))
    spans = traced.spec.groups["conv1"].spans
    index = next(i for i, s in enumerate(spans) if (s.axis.parameter, s.axis.dim) == ("conv2.weight", 1))
    with pytest.raises(InputError, match="group conv1:"):
        verify(network, without(traced, "conv1", index), images(2))


def test_a_flattened_concatenation_is_traced_unit_by_unit(randomise):
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
            self.fc = nn.Linear(7 * 4 * 4, 3)

        def forward(self, x):
            return self.fc(torch.cat([self.one(x), self.other(x).relu()], 1).flatten(1))

    network = randomise(Flattened(), 0)
    traced = trace(network, example())
    verify(network, traced, example())
    spans = [traced.spec.groups[name].spans[-1] for name in ("one", "other")]
    assert spans == [Span(Axis("fc.weight", 1), 0, 16), Span(Axis("fc.weight", 1), 3 * 16, 16)]


def test_a_graph_that_computes_something_else_is_caught(small, images):
    network = small()
    traced = trace(network, images())
    nodes = [
        dataclasses.replace(n, operation="tanh") if n.operation == "relu" else n for n in traced.graph.nodes
    ]
    wrong = dataclasses.replace(traced, graph=dataclasses.replace(traced.graph, nodes=tuple(nodes)))
    with pytest.raises(InputError, match="Small: the traced graph does not compute"):
        verify(network, wrong, images())


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (lambda y: m.inplace(y) + y)(m.conv(x)),
        lambda m, x: (lambda y: (y.add_(1), y)[1])(m.conv(x)),
        lambda m, x: m.odd_pool(m.conv(x)),
    ],
)
def test_what_is_changed_in_place_is_read_as_what_it_does(body):
    network = Spelled(body, head=False).double()
    verify(network, trace(network, example()), example())


def test_chance_is_caught():
    network = Spelled(lambda m, x: F.dropout(m.conv(x)), head=False).double()
    with pytest.raises(InputError, match="other numbers each time for the same images"):
        verify(network, trace(network, example()), example())


def test_a_buffer_that_counts_calls_is_no_result():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.fc(self.conv(x).relu().mean((2, 3)))

    network = Counting().double()
    traced = trace(network, example())
    verify(network, traced, example())
    assert list(traced.spec.free) == ["conv"]
    assert int(network.calls) == 0


# -- spellings ----------------------------------------------------------------------------------------------------


class Spelled(nn.Module):
    """Layers to spell a forward with."""

    def __init__(self, body, head=True):
        super().__init__()
        self.body, self.head = body, head
        self.conv, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu, self.inplace, self.flat = nn.ReLU(), nn.ReLU(inplace=True), nn.Flatten()
        self.drop, self.same = nn.Dropout(), nn.Identity()
        self.pool, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.odd_pool = nn.AvgPool2d(2, divisor_override=3)
        self.fc, self.size = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.body(self, x)) if self.head else self.body(self, x)


def example():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def average(x):
    return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


SPELLINGS = {
    "relu": [
        lambda m, x: average(m.relu(m.conv(x))),
        lambda m, x: average(m.inplace(m.conv(x))),
        lambda m, x: average(F.relu(m.conv(x))),
        lambda m, x: average(F.relu(input=m.conv(x), inplace=True)),
        lambda m, x: average(torch.relu(m.conv(x))),
        lambda m, x: average(m.conv(x).relu()),
        lambda m, x: average(m.conv(x).relu_()),
        lambda m, x: average(m.drop(m.same(F.relu(m.conv(x))))),
        lambda m, x: average(F.dropout(F.relu(m.conv(x)), 0.5, m.training).contiguous()),
    ],
    "flatten": [
        lambda m, x: torch.flatten(F.adaptive_avg_pool2d(m.conv(x), 1), 1),
        lambda m, x: torch.flatten(F.adaptive_avg_pool2d(m.conv(x), (1, 1)), start_dim=1),
        lambda m, x: m.flat(F.adaptive_avg_pool2d(m.conv(x), 1)),
        lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).flatten(1),
        lambda m, x: (lambda y: y.view(y.size(0), -1))(F.adaptive_avg_pool2d(m.conv(x), 1)),
        lambda m, x: (lambda y: y.view(y.size(dim=0), -1))(F.adaptive_avg_pool2d(m.conv(x), 1)),
        lambda m, x: (lambda y: y.view((y.shape[0], -1)))(F.adaptive_avg_pool2d(m.conv(x), 1)),
        lambda m, x: (lambda y: y.reshape(y.size()[0], -1))(F.adaptive_avg_pool2d(m.conv(x), 1)),
        lambda m, x: (lambda y: torch.reshape(y, (y.shape[0], -1)))(F.adaptive_avg_pool2d(m.conv(x), 1)),
    ],
    "mean": [
        lambda m, x: m.conv(x).mean((2, 3)),
        lambda m, x: m.conv(x).mean([-1, -2]),
        lambda m, x: m.conv(x).mean(dim=(2, 3)),
        lambda m, x: torch.mean(m.conv(x), (2, 3)),
        lambda m, x: m.conv(x).mean(3).mean(2),
        lambda m, x: m.conv(x).mean((2, 3), True).flatten(1),
        lambda m, x: torch.mean(m.conv(x), dim=(2, 3), keepdim=True).flatten(1),
        lambda m, x: average(m.conv(x)),
    ],
    "add": [
        lambda m, x: (lambda y: average(y + m.second(F.relu(y))))(m.conv(x)),
        lambda m, x: (lambda y: average(torch.add(y, m.second(F.relu(y)))))(m.conv(x)),
        lambda m, x: (lambda y: average(y.add(m.second(F.relu(y)))))(m.conv(x)),
        lambda m, x: (lambda y: average(y.add_(m.second(F.relu(y)))))(m.conv(x)),
        lambda m, x: (lambda y: average(sum([y, m.second(F.relu(y))])))(m.conv(x)),
    ],
    "numbers": [
        lambda m, x: average(2 * m.conv(x) + 1),
        lambda m, x: average(1 + m.conv(x) * 2),
        lambda m, x: average(torch.add(m.conv(x).mul(2), 1)),
        lambda m, x: average(torch.mul(m.conv(x), 2).add_(1)),
    ],
    "gate": [
        lambda m, x: (lambda y: average(y * torch.sigmoid(m.second(y))))(m.conv(x)),
        lambda m, x: (lambda y: average(y.mul(m.second(y).sigmoid())))(m.conv(x)),
    ],
    "max pool": [
        lambda m, x: average(m.pool(m.conv(x))),
        lambda m, x: average(F.max_pool2d(m.conv(x), 2)),
        lambda m, x: average(F.max_pool2d(m.conv(x), kernel_size=2, stride=2)),
    ],
    "mean pool": [lambda m, x: average(m.mean(m.conv(x))), lambda m, x: average(F.avg_pool2d(m.conv(x), 2))],
    "settings that are computed": [
        lambda m, x: average(F.avg_pool2d(m.conv(x), (x.shape[2] // 2, 2)) * x.shape[1]),
        lambda m, x: average(F.avg_pool2d(m.conv(x), 2) * 2),
    ],
    "squeeze": [
        lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).squeeze(-1).squeeze(-1),
        lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).reshape(-1, 4),
        lambda m, x: average(m.conv(x)),
    ],
    "tokens": [
        lambda m, x: m.conv(x).flatten(2).transpose(1, 2).mean(1),
        lambda m, x: (
            (lambda y: y.reshape(y.shape[0], 4, y.shape[2] * y.shape[3]))(m.conv(x)).permute(0, 2, 1).mean(1)
        ),
        lambda m, x: torch.permute(m.conv(x), (0, 2, 3, 1)).flatten(1, 2).mean(1),
        lambda m, x: torch.transpose(m.conv(x), 1, 3).mean((1, 2)),
    ],
    "one token": [
        lambda m, x: m.conv(x).flatten(2).transpose(1, 2)[:, 3],
        lambda m, x: m.conv(x).flatten(2)[:, :, 3],
        lambda m, x: m.conv(x).flatten(2)[:, :, 3:4].flatten(1),
    ],
    "side by side in space": [
        lambda m, x: (lambda y: average(torch.cat([y, F.relu(y)], 3)))(m.conv(x)),
        lambda m, x: (lambda y: average(torch.cat([y, F.relu(y)], 2)))(m.conv(x)),
    ],
    "a layer called size": [lambda m, x: m.size(average(m.conv(x)))],
}


@pytest.mark.parametrize("what", SPELLINGS)
@torch.no_grad()
def test_spellings_of_one_function_trace_to_that_function(what, randomise):
    first, *others = [randomise(Spelled(body), 0) for body in SPELLINGS[what]]
    traced = trace(first, example())
    expected = first(example())
    for network in [first, *others]:
        other = trace(network, example())
        verify(network, other, example())
        torch.testing.assert_close(run_graph(other.graph, network.state_dict(), example()), expected)
        assert other.spec == traced.spec


# -- refusals -----------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 4)
        self.inner = nn.ModuleDict(
            {"norm": nn.LocalResponseNorm(2), "bare": nn.BatchNorm2d(4, track_running_stats=False)}
        )
        self.thin, self.conv2 = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 4, 1)
        self.six, self.in_two = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, groups=2)
        self.in_three, self.of_eight = nn.GroupNorm(3, 6), nn.Conv2d(8, 4, 1, groups=2)
        self.places, self.attend = nn.LayerNorm((4, 4)), nn.MultiheadAttention(4, 2, batch_first=True)
        self.late = nn.MultiheadAttention(4, 2)
        self.circular = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.ones(4, 1, 1), persistent=False)

    def tokens(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)


READ = {  # what other readers refuse: each verified
    "sin": lambda m, x: torch.sin(m.conv(x)),
    "neighbours": lambda m, x: m.inner["norm"](m.conv(x)),
    "statistics of the batch": lambda m, x: m.inner["bare"](m.conv(x)),
    "norm over places": lambda m, x: m.places(m.conv(x)),
    "parts of two sizes": lambda m, x: m.in_three(m.in_two(m.six(x))),
    "groups of a concatenation": lambda m, x: m.of_eight(torch.cat([m.conv(x), m.conv2(x)], 1)),
    "table": lambda m, x: m.conv(x) + m.table,
    "a permuted batch": lambda m, x: m.conv(x).permute(1, 0, 2, 3),
    "padding mode": lambda m, x: m.circular(x),
    "used twice": lambda m, x: m.fc(F.relu(m.fc(average(m.conv(x))))),
    "tied": lambda m, x: m.other(F.relu(m.one(average(m.conv(x))))),
    "parameter": lambda m, x: m.conv(x) * m.scale,
    "parameter alone": lambda m, x: m.conv(x) * torch.sigmoid(m.scale),
    "difference": lambda m, x: m.conv(x) - 1,
    "slice": lambda m, x: m.conv(x)[:, :2],
    "two slices": lambda m, x: m.conv(x)[:, :, 1:, 1:],
    "axis": lambda m, x: torch.cat([m.conv(x), x], axis=1),
    "keyword": lambda m, x: m.conv(input=x),
    "one map for all units": lambda m, x: m.conv(x) * F.relu(m.thin(x)),
    "attention weights": lambda m, x: (lambda t: m.attend(t, t, t)[1].flatten(1))(m.tokens(x)),
    "hooked": lambda m, x: m.conv(x.clone().relu_()).mul_(2).add_(1),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_what_is_written_in_another_way_is_read(what):
    kind = type("Read", (Refused,), {"forward": lambda self, x: READ[what](self, x)})
    network = kind().double()
    verify(network, trace(network, example()), example())


CUTS = "cuts through units"
EXPORT = "torch.export cannot read it"
REFUSALS = {
    "method": (lambda m, x: m.conv(x).mode(1)[0], "Refused: no rule for mode"),
    "along units": (lambda m, x: m.conv(x).cumsum(1), "cumsum along the units"),
    "along images": (lambda m, x: m.conv(x).cumsum(0), "a call along the images"),
    "attention mask": (
        lambda m, x: (lambda t: m.attend(t, t, t, attn_mask=t[:, :, 0])[0])(m.tokens(x)), EXPORT),
    "branch": (lambda m, x: m.conv(x) if x.sum() > 0 else x, f"Refused: {EXPORT}"),
    "loop": (lambda m, x: sum(y for y in m.conv(x)), "no rule for one of the images"),
    "several outputs": (lambda m, x: (m.conv(x), x), "several values"),
    "alpha": (lambda m, x: torch.add(m.conv(x), m.conv.bias[:, None, None], alpha=2), "add with alpha=2"),
    "one image": (lambda m, x: m.conv(x)[0], "no rule for one of the images"),
    "view": (lambda m, x: m.conv(x).view(-1, 4), f"Refused: rearrange {CUTS}"),
    "one dimension": (lambda m, x: m.conv(x).view(-1), CUTS),
    "flatten all": (lambda m, x: torch.flatten(m.conv(x)), CUTS),
    "mean over units": (lambda m, x: m.conv(x).mean(1), "mean over the units"),
    "mean over images": (lambda m, x: m.conv(x).mean((0, 2)), "no rule for mean over the images"),
    "mean of all": (lambda m, x: m.conv(x).mean(), "mean over everything"),
    "concatenate rows": (lambda m, x: torch.cat([m.conv(x), x.mul(2)], 2), EXPORT),
    "concatenate images": (lambda m, x: (lambda y: torch.cat([y, y], 0))(m.conv(x)), "images side by side"),
    "wrong width": (lambda m, x: m.fc(average(x)), EXPORT),
}  # fmt: skip


WRONG = {  # read, and found to be something else when it is verified
    "size as a value": (lambda m, x: m.conv(x) * x.shape[0], "does not compute"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_read_wrongly_is_caught(what):
    body, message = WRONG[what]
    network = type("Wrong", (Refused,), {"forward": lambda self, x: body(self, x)})().double()
    with pytest.raises(InputError, match=message):
        verify(network, trace(network, example()), example())


@pytest.mark.parametrize("what", REFUSALS)
def test_what_has_no_rule_is_refused_by_name_in_one_line(what):
    body, message = REFUSALS[what]
    kind = type("Refused", (Refused,), {"forward": lambda self, x: body(self, x)})
    with pytest.raises(InputError, match=message) as error:
        trace(kind(), example().float())
    assert "\n" not in str(error.value)


def test_a_refusal_names_the_module_and_the_line():
    class Sums(nn.Module):
        def forward(self, x):
            return torch.special.erfcx(x)

    network = nn.Sequential(nn.Linear(4, 3), Sums(), nn.Linear(3, 2))
    with pytest.raises(
        InputError,
        match=r"^1: no rule for special_erfcx at .*test_trace.py:\d+ \(return torch.special.erfcx\(x\)\)",
    ):
        trace(network, torch.zeros(1, 4))


def test_a_second_input_is_refused_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, mask):
            return self.fc(x)

    with pytest.raises(InputError, match="mask: a second input"):
        trace(Two(), torch.zeros(1, 4))


def test_an_input_that_has_a_default_takes_it():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, mask=None, twice=True, times=3):
            x = self.fc(x if mask is None else x * mask) * times
            return x + x if twice else x

    network, x = Optional().double(), torch.rand(2, 4).double()
    verify(network, trace(network, x), x)


# -- nothing is left behind ---------------------------------------------------------------------------------------


def test_tracing_leaves_the_network_as_it_was(small, images):
    network = small().train()
    network.bn2.eval()
    network.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    verify(network, trace(network, images()), images())
    assert [module.training for module in network.modules()] == modes
    assert not network.conv1.weight.requires_grad
    assert network.conv2.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_trace_does_not_depend_on_the_example_or_the_weights(small, images):
    first, second = trace(small(0), images(1)), trace(small(1).train(), 100 * images(5, 3))
    assert first == second
