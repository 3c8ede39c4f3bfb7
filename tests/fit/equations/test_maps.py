"""The normal equations from maps against those from rows, and a whole fit either way."""

import pytest
import torch
import torch.nn.functional as F

from stages.core.graph.nodes import Node
from stages.core.recipe.methods import Fit
from stages.core.runtime.errors import InputError
from stages.core.sweep.batches import images_to_batches
from stages.core.sweep.rows import input_rows, output_rows
from stages.core.units.matching import full_split, identity_matching
from stages.fit.equations.maps import MapEquations
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.solve import solve
from stages.fit.network import fit_network


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_solved_from_maps_is_that_solved_from_rows(intercept, stride):
    a = {"stride": [stride] * 2, "padding": [1, 1], "dilation": [1, 1]}
    node, z = Node("c", "conv2d", ("x",), a), 1 + random(20, 4, 6, 6)
    y = F.conv2d(z, random(5, 4, 3, 3, seed=1), **a)
    y = y + random(*y.shape, seed=2)
    maps, rows = MapEquations(node, (3, 3), (6, 6), intercept), NormalEquations(36, 5, intercept, z.device)
    for weight, some in ((1.0, slice(0, 12)), (0.5, slice(12, 20))):
        maps.add(z[some], y[some], weight)
        rows.add(input_rows(node, z[some], (3, 3)), output_rows(node, y[some]), weight)
    outputs, columns = torch.tensor([0, 3, 4]), torch.arange(9, 36)
    start = random(3, 27, seed=3)
    found, expected = (solve(own.block(outputs, columns), start, 1e-3) for own in (maps, rows))
    for what in ("weight", "bias", "residual", "energy", "moments") if intercept else ("weight", "residual"):
        torch.testing.assert_close(getattr(found, what), getattr(expected, what))


def test_maps_that_are_not_finite_are_refused_and_none_are_added_late():
    node = Node("c", "conv2d", ("x",), {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]})
    equations = MapEquations(node, (3, 3), (4, 4), True, "layer")
    with pytest.raises(InputError, match="layer: no rows"):
        equations.block(torch.arange(1), torch.arange(9))
    equations.add(random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1))
    equations.block(torch.arange(1), torch.arange(9))
    with pytest.raises(AssertionError, match="maps are added"):
        equations.add(random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1))
    equations = MapEquations(node, (3, 3), (4, 4), True, "layer")
    equations.add(random(2, 1, 4, 4) / 0, random(2, 1, 4, 4, seed=1))
    with pytest.raises(InputError, match="NaN or infinite"):
        equations.block(torch.arange(1), torch.arange(9))


@torch.no_grad()
@pytest.mark.parametrize(
    "fit", [Fit(), Fit(inputs="merged", targets="own", norm="fold"), Fit(solver="regmean")]
)
def test_a_fit_is_the_same_from_maps_and_from_rows(fit, small, images, sources, splits, monkeypatch):
    made, found = sources([small(0), small(1)], images()), []
    spec = made[0].trace.spec
    for split in (full_split(spec), splits(spec, 1)):
        for maps in (True, False):
            monkeypatch.setattr("stages.fit.layer.worthwhile", lambda plan, c, maps=maps: maps)
            batches = images_to_batches([images(40, 0), images(40, 1)], 16)
            merged, record = fit_network(
                made,
                identity_matching(spec, 2),
                split,
                batches,
                fit,
                labels="shared",
                precision=torch.float64,
            )
            found.append((merged(images(9, 4)), [line.residual for line in record]))
        torch.testing.assert_close(found[-1][0], found[-2][0], rtol=1e-7, atol=1e-7)
        assert found[-1][1] == pytest.approx(found[-2][1], rel=1e-6, abs=1e-9)
