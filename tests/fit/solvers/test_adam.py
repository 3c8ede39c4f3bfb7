"""The published iteration: no further than its steps, better than the average, worse than the closed form."""

import itertools

import pytest
import torch

from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import images_to_batches
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network

CHOICES = list(itertools.product(["source", "merged"], ["ensemble", "own"]))


def merge(made, matching, batches, fit):
    split = full_split(made[0].trace.spec)
    return fit_network(
        made, matching, split, batches, fit, labels="shared", ridge=0.0, precision=torch.float64
    )


@torch.no_grad()
@pytest.mark.parametrize(("inputs", "targets"), CHOICES)
def test_a_copy_moves_no_further_than_the_steps(small, images, copies, calibrate, sources, inputs, targets):
    batches = images_to_batches([images(30, task) for task in range(3)], 20)
    network = calibrate(small(0), torch.cat([batch.images for batch in batches]))
    networks, matching = copies(network, images(), 3)
    fit = Fit(solver="adam", inputs=inputs, targets=targets, steps=4)
    merged, record = merge(sources(networks, images()), matching, batches, fit)
    torch.testing.assert_close(merged(images(9, 9)), network(images(9, 9)), rtol=0.05, atol=0.05)
    assert all(line.residual < 1e-3 for line in record)


@torch.no_grad()
@pytest.mark.parametrize(("inputs", "targets"), CHOICES)
def test_adam_comes_between_the_average_and_the_closed_form(small, images, sources, splits, inputs, targets):
    made = sources([small(0), small(1)], images())
    spec = made[0].trace.spec
    batches = images_to_batches([images(30, 0), images(30, 1)], 20)
    shared = {"inputs": inputs, "targets": targets}
    fits = [Fit(**shared), Fit(solver="adam", steps=200, learning_rate=0.02, **shared),
            Fit(solver="adam", steps=1, learning_rate=1e-12, **shared)]  # fmt: skip
    left = [merge(made, identity_matching(spec, 2), batches, fit)[1][0].residual for fit in fits]
    if targets == "own":
        assert left[0] < left[1] < left[2]
    else:  # what the images alone lead to is averaged exactly
        assert max(left) < 1e-9
