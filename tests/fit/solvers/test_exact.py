"""The closed form with a ridge of its own choice, against least squares of the rows."""

import pytest
import torch
from torch import nn

from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import images_to_batches
from stages.core.sweep.rows import input_rows, output_rows, weight_matrix
from stages.core.sweep.sweep import Sweep
from stages.core.units.matching import full_split, identity_matching
from stages.fit.average import fill_average
from stages.fit.equations.ridge import GRID, held_out
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
        counts = [0, 0]
        for index, task, weight in problem.batches():
            z, y = problem.inputs(index), problem.targets(index)
            held = held_out(len(z), counts[task])
            counts[task] += len(z)
            for part in (False, True):
                own_z = input_rows(node, z[held == part], layer.kernel)
                own_y = output_rows(node, y[held == part])
                rows[part].append((own_z, own_y, torch.full((len(own_z),), weight).double()))
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
    Sweep(made, batches, network, torch.float64).run(compare, None)
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
