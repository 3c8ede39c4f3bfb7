"""No second pass where the fit has set exact statistics: it would have found the same."""

import pytest
import torch

from stages.core.recipe.methods import Fit
from stages.core.sweep.batches import images_to_batches
from stages.core.units.matching import full_split, identity_matching
from stages.fit.network import fit_network
from stages.recalibrate import recalibrate as stage
from stages.recalibrate.batchnorm import recompute_statistics
from stages.recalibrate.ways import batchnorm as way


@pytest.fixture
def fitted(small, images, sources):
    made = sources([small(0), small(1)], images())
    spec, batches = made[0].trace.spec, images_to_batches([images(20, 0), images(20, 1)], 8)
    fit = Fit(inputs="merged", targets="own", norm="fold")
    network, _ = fit_network(
        made,
        identity_matching(spec, 2),
        full_split(spec),
        batches,
        fit,
        labels="shared",
        precision=torch.float64,
    )
    return network, batches


def passes(network, batches, monkeypatch, precision=torch.float64):
    """How often the images are swept."""
    count = []
    monkeypatch.setattr(way, "recompute_statistics", lambda *arguments: count.append(arguments))
    stage.recalibrate(network, "batchnorm", batches, precision=precision)
    return len(count)


def test_a_second_pass_finds_what_the_fit_has_set(fitted):
    network, batches = fitted
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recompute_statistics(network, batches, torch.float64)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-9, atol=1e-9)


def test_it_is_left_out_for_the_same_images_however_they_are_cut(fitted, images, monkeypatch):
    network, batches = fitted
    assert passes(network, batches, monkeypatch) == 0
    assert passes(network, images_to_batches([images(20, 0), images(20, 1)], 5), monkeypatch) == 0


def test_it_is_made_for_other_images_tasks_weights_or_precision(fitted, images, monkeypatch):
    network, batches = fitted
    assert passes(network, images_to_batches([images(20, 0), images(19, 1)], 8), monkeypatch) == 1
    assert passes(network, images_to_batches([images(20, 1), images(20, 0)], 8), monkeypatch) == 1
    assert passes(network, batches, monkeypatch, torch.bfloat16) == 1
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-12
    assert passes(network, batches, monkeypatch) == 1
