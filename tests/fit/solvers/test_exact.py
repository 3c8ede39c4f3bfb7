"""The closed form with a ridge of its own choice, against least squares of the rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import images_to_batches
from stages.core.sweep.rows import input_rows, output_rows, weight_matrix
from stages.core.sweep.sweep import Sweep
from stages.core.units.matching import full_split, identity_matching
from stages.fit.average import fill_average
from stages.fit.equations.ridge import GRID, apart
from stages.fit.layer import Layer
from stages.fit.network import build, fit_network
from stages.fit.problem import LayerProblem
from stages.fit.setup import Setup
from stages.fit.solvers.exact import exact
from stages.fit.start import starts


class Mixed(nn.Module):
    """A convolution, a grouped one, and two linear layers, one of which reads more than there are rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.fc = nn.Linear(8 * 36, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.fc(torch.relu(self.hidden(x.flatten(1))))


def ridge_regression(z, y, w, start, ridge):
    """W, b by the plain formula about the means."""
    mean_z, mean_y = (w[:, None] * z).sum(0) / w.sum(), (w[:, None] * y).sum(0) / w.sum()
    A, R = z - mean_z, y - mean_y
    G = A.T @ (w[:, None] * A)
    penalty = ridge * G.diagonal().mean() * torch.eye(len(G)).double()
    W = torch.linalg.solve(G + penalty, A.T @ (w[:, None] * R) + penalty @ start.T).T
    return W, mean_y - W @ mean_z


class Compare:
    """At every layer: the ridge that is chosen and the weights against plain ones."""

    def __init__(self, setup):
        self.setup, self.seen = setup, {}

    def wants(self, node):
        return node.fitted

    @torch.no_grad()
    def visit(self, node, sweep):
        problem = LayerProblem(layer := Layer(self.setup, node), sweep)
        rows = {False: [], True: []}
        for index, _, weight in problem.batches():
            own_z = input_rows(node, problem.inputs(index), layer.kernel)
            own_y = output_rows(node, problem.targets(index))
            rows[bool(problem.part(index))].append((own_z, own_y, torch.full((len(own_z),), weight).double()))
        learnt, other = (tuple(map(torch.cat, zip(*rows[part], strict=True))) for part in (False, True))
        whole = tuple(map(torch.cat, zip(learnt, other, strict=True)))
        start = weight_matrix(starts(layer)[0]).clone()
        groups = layer.module.groups if node.grouped else 1

        def solved(parts, ridge):
            z, y, w = parts
            pieces = zip(z.chunk(groups, 1), y.chunk(groups, 1), start.chunk(groups), strict=True)
            return [ridge_regression(own_z, own_y, w, own, ridge) for own_z, own_y, own in pieces]

        def loss(ridge):
            z, y, w = other
            pieces = zip(z.chunk(groups, 1), y.chunk(groups, 1), solved(learnt, ridge), strict=True)
            return sum((w[:, None] * (a @ W.T + b - c).square()).sum() for a, c, (W, b) in pieces)

        solver = exact(self.setup).grouped if node.grouped else exact(self.setup).dense
        found = solver.fit(problem)
        lowest = min(GRID, key=loss)
        self.seen[node.name] = found.ridge
        torch.testing.assert_close(loss(found.ridge), loss(lowest), rtol=1e-9, atol=0)
        expected = torch.cat([W for W, _ in solved(whole, found.ridge)])
        weight = layer.module.weight if node.grouped else layer.module.weights[0]
        torch.testing.assert_close(weight_matrix(weight), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [20, 60])
def test_the_ridge_of_each_layer_is_the_best_for_images_held_out(randomise, sources, count):
    networks = [randomise(Mixed(), seed) for seed in range(2)]
    images = [
        torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(2)
    ]
    made = sources(networks, images[0])
    spec = made[0].trace.spec
    network = build(made, identity_matching(spec, 2), full_split(spec), "shared", {})
    fill_average(network, made)
    setup, batches = Setup(network, made, Fit(inputs="merged", targets="own")), images_to_batches(images, 16)
    compare = Compare(setup)
    Sweep(made, apart(batches), network, torch.float64).run(compare, None)
    assert len(compare.seen) == 4
    assert set(compare.seen.values()) <= set(GRID)


def test_fewer_images_than_can_be_held_out_are_fitted_with_a_large_ridge(small, sources, images):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    some = images_to_batches([images(4, 1), images(9, 2)], 16)
    settings = {"labels": "shared", "precision": torch.float64}
    matching, split, fit = identity_matching(spec, 2), full_split(spec), Fit(inputs="merged", targets="own")
    auto, record = fit_network(made, matching, split, some, fit, **settings)
    fixed, _ = fit_network(made, matching, split, some, fit, ridge=0.1, **settings)
    assert {line.ridge for line in record} == {0.1}
    assert all(torch.equal(auto.state_dict()[name], own) for name, own in fixed.state_dict().items())


def test_a_common_scale_of_the_images_changes_no_choice(small, sources, images):
    """The ridge is relative to G: what is chosen depends on no unit of measurement."""
    made = sources([small(0), small(1)], images())
    spec, fit = made[0].trace.spec, Fit(inputs="source", targets="own")
    chosen = []
    for repeat in (1, 2):  # the same images twice weigh twice
        some = images_to_batches([torch.cat([images(40, seed)] * repeat) for seed in (1, 2)], 40)
        _, record = fit_network(
            made,
            identity_matching(spec, 2),
            full_split(spec),
            some,
            fit,
            labels="shared",
            precision=torch.float64,
        )
        chosen.append([line.ridge for line in record])
    assert chosen[0] == chosen[1]


# -- transposed convolutions ----------------------------------------------------------------------------------------

UP = {
    1: (nn.Conv1d, nn.ConvTranspose1d, F.conv_transpose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, F.conv_transpose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, F.conv_transpose3d),
}
SPREAD = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 1, "dilation": 2},
]


class Grown(nn.Module):
    """A convolution, a transposed one (and the batch norm behind it), a depthwise one, a head."""

    def __init__(self, rank, norm=False, **settings):
        super().__init__()
        conv, up, _ = UP[rank]
        self.conv, self.up = conv(2, 4, 3, padding=1), up(4, 5, bias=not norm, **settings)
        self.norm = (
            {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](5) if norm else nn.Identity()
        )
        self.each, self.fc = up(5, 5, groups=5, **settings), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.up(torch.tanh(self.conv(x)))))
        return self.fc(torch.tanh(self.each(x)).flatten(2).mean(-1))


def grown(randomise, sources, rank, count=12, **settings):
    networks = [randomise(Grown(rank, **settings), seed) for seed in range(2)]
    shape = [2, *[4, 4, 3][:rank]]
    images = [torch.randn(count, *shape, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2)]
    return sources(networks, images[0]), images


class AgainstLstsq(Compare):
    """Every transposed map against least squares of what each of its weights alone makes of the inputs."""

    def wants(self, node):
        return node.transposed

    @torch.no_grad()
    def visit(self, node, sweep):
        problem, run = (
            LayerProblem(layer := Layer(self.setup, node), sweep),
            UP[len(node.attributes["stride"])][2],
        )
        module = layer.module
        a = {name: value for name, value in node.attributes.items() if name != "groups"}
        z = torch.cat([problem.inputs(i) for i, *_ in problem.batches()])
        y = torch.cat([problem.targets(i) for i, *_ in problem.batches()])
        taps = torch.eye(layer.taps).double().view(layer.taps, 1, 1, *layer.kernel)
        made = torch.stack([torch.cat([run(c, tap, **a) for c in z.split(1, 1)], 1) for tap in taps], 2)
        made = made.flatten(3).movedim(3, 1).flatten(0, 1)  # (images * places, c, taps)
        targets = y.flatten(2).movedim(2, 1).flatten(0, 1)
        groups = module.groups if node.grouped else 1
        solver = exact(self.setup).grouped if node.grouped else exact(self.setup).dense
        found = solver.fit(problem)
        weight = (module.weight if node.grouped else module.weights[0]).flatten(1)
        one, expected, bias = made.new_ones(len(made), 1), [], []
        for own_z, own_y in zip(made.chunk(groups, 1), targets.chunk(groups, 1), strict=True):
            design = torch.cat([own_z.flatten(1), one], 1)
            solution = torch.linalg.lstsq(design, own_y, driver="gelsd").solution.T
            expected.append(solution[:, :-1])
            bias.append(solution[:, -1])
        torch.testing.assert_close(weight, torch.cat(expected), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.bias, torch.cat(bias), rtol=1e-6, atol=1e-8)
        self.seen[node.name] = found.residual / found.energy


@pytest.mark.parametrize("settings", SPREAD)
@pytest.mark.parametrize("rank", UP)
def test_a_transposed_convolution_is_fitted_as_lstsq_does(randomise, sources, rank, settings):
    made, images = grown(randomise, sources, rank, 20, **settings)
    spec = made[0].trace.spec
    network = build(made, identity_matching(spec, 2), full_split(spec), "shared", {})
    fill_average(network, made)
    setup = Setup(network, made, Fit(inputs="source", targets="ensemble", norm="average"), 0.0)
    compare = AgainstLstsq(setup)
    Sweep(made, images_to_batches(images, 20), None, torch.float64).run(compare, None)
    assert list(compare.seen) == ["up", "each"]
    assert 1e-6 < compare.seen["up"] < 1


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_every_solver_fits_a_transposed_convolution(randomise, sources, splits, norm, share):
    """Of all rows the closed form leaves least, and Adam less than where it starts."""
    made, images = grown(randomise, sources, 2, **SPREAD[1], norm=norm)
    spec, left = made[0].trace.spec, {}
    fits = {
        "exact": Fit(inputs="source", targets="own", norm="average"),
        "adam": Fit(
            solver="adam", inputs="source", targets="own", norm="average", steps=300, learning_rate=0.01
        ),
        "start": Fit(
            solver="adam", inputs="source", targets="own", norm="average", steps=1, learning_rate=1e-12
        ),
        "regmean": Fit(solver="regmean"),
        "featcal": Fit(solver="featcal"),
    }
    for name, fit in fits.items():
        found, record = fit_network(
            made, identity_matching(spec, 2), splits(spec, 0), images_to_batches(images, 5), fit, labels="shared",
            ridge=0.0, positions=share, precision=torch.float64,
        )  # fmt: skip
        left[name] = {line.layer: line.residual for line in record}["up"]
        assert torch.isfinite(found(images[0])).all()
    if share == 1.0:
        assert left["exact"] < left["adam"] < left["start"]
