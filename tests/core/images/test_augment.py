import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.images.augment import augment


def coordinates(n, h, w):
    """Images that hold their own row and column: (n, 2, h, w)."""
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return grid.to(torch.uint8).expand(n, 2, h, w)


@given(
    h=st.integers(2, 9),
    w=st.integers(2, 9),
    shift=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_augmentation_moves_and_mirrors_and_nothing_else(h, w, shift, flip, seed):
    found = augment(coordinates(40, h, w), shift, flip, torch.Generator().manual_seed(seed)).long()
    assert found.shape == (40, 2, h, w)
    for image in found:
        options = []
        for dy, dx in itertools.product(range(-shift, shift + 1), repeat=2):
            rows = (torch.arange(h) + dy).clamp(0, h - 1)
            columns = (torch.arange(w) + dx).clamp(0, w - 1)
            options += [(rows, columns), (rows, columns.flip(0))] if flip else [(rows, columns)]
        expected = (torch.stack([r.view(h, 1).expand(h, w), c.expand(h, w)]) for r, c in options)
        assert any(torch.equal(image, option) for option in expected)


def test_augmentation_draws_each_image_by_itself_and_reaches_every_shift():
    found = augment(coordinates(400, 7, 7), 2, True, torch.Generator().manual_seed(0))
    centres = found[:, :, 3, 3].tolist()
    assert {(y, x) for y, x in centres} == set(itertools.product(range(1, 6), repeat=2))
    mirrored = (found[:, 1, 3, 2] > found[:, 1, 3, 4]).float().mean()
    assert 0.4 < mirrored < 0.6


def test_augmentation_commutes_with_inversion():
    images = torch.randint(256, (20, 1, 6, 6), generator=torch.Generator().manual_seed(0)).byte()
    one = augment(255 - images, 2, True, torch.Generator().manual_seed(1))
    other = 255 - augment(images, 2, True, torch.Generator().manual_seed(1))
    assert torch.equal(one, other)
