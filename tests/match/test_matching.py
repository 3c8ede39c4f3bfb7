"""Matchings by any way, on the same sources."""

import torch

from stages.core.graph.source import Source, Task
from stages.core.recipe.methods import MatchSettings
from stages.core.sweep.batches import images_to_batches
from stages.core.units.moments import pool
from stages.match.matching import make_matching
from stages.statistics.moments import gather


def pooled(sources, images):
    gathered = gather(sources, images_to_batches([images(40, m) for m in range(len(sources))], 20))
    return pool(gathered, len(sources), len(sources))


def match(sources, settings, found):
    return make_matching(sources, settings, found, torch.Generator().manual_seed(0))


def test_a_permuted_copy_is_recovered_by_weights_and_by_activations(small, images, sources, copies):
    networks, expected = copies(small(), images())
    made = sources(networks, images())
    found = pooled(made, images)
    for settings in (
        MatchSettings(by="weights"),
        MatchSettings(by="activations"),
        MatchSettings(by="activations", similarity="correlation"),
    ):
        matching, benefits = match(made, settings, found)
        for group, units in expected.units.items():
            assert torch.equal(matching.units[group], units)
            torch.testing.assert_close(
                matching.similarity[group], torch.ones_like(matching.similarity[group])
            )
            assert benefits[group].max() < 1e-6  # what is the same is worth nothing apart


def test_identity_pairs_by_position_and_says_how_alike(small, images, sources):
    made = sources([small(0), small(1)], images())
    matching, benefits = match(made, MatchSettings(by="identity"), pooled(made, images))
    for group, units in matching.units.items():
        assert torch.equal(units, torch.arange(units.shape[1]).repeat(2, 1))
        assert (matching.similarity[group][1].abs() <= 1 + 1e-9).all()
        assert (benefits[group] >= 0).all()
        assert benefits[group].sum() > 0


def test_heads_of_other_label_spaces_do_not_count(small, images, sources):
    """Equally wide heads of different classes: what they hold must not move the matching by weights."""
    made = sources([small(0), small(1)], images())
    found = pooled(made, images)
    apart = [
        Source(s.trace, s.state, Task(s.task.name, (f"{m}a", f"{m}b", f"{m}c"))) for m, s in enumerate(made)
    ]
    name = made[0].graph.output.parameters["weight"]
    loud = [Source(s.trace, {**s.state, name: 100 * s.state[name].flip(1)}, s.task) for s in apart]
    quiet, shouted = (match(sources_, MatchSettings(by="weights"), found)[0] for sources_ in (apart, loud))
    assert all(torch.equal(quiet.units[group], shouted.units[group]) for group in quiet.units)
