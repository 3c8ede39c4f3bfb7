"""A source that is no better than guessing is found, whatever the number of classes and their shares."""

import logging

import pytest
import torch

from stages.core.runtime.errors import InputError
from stages.probe.__main__ import at_chance as of_tasks
from stages.probe.chance import at_chance, chance, warning
from stages.probe.evaluate import linear_probe

EVEN = torch.arange(10).repeat(50)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.0, True), (10.0, True), (12.6, True), (12.8, False)])
def test_guessing_ten_classes_and_a_little_luck(accuracy, expected):
    assert at_chance(accuracy, EVEN) is expected


def test_always_saying_the_commonest_class_is_guessing():
    uneven = torch.tensor([0] * 90 + [1] * 10)
    assert chance(uneven) == 90.0
    assert at_chance(90.0, uneven)
    assert at_chance(95.0, uneven)  # within two deviations of it
    assert not at_chance(99.0, uneven)


def test_random_guesses_are_seldom_taken_for_knowledge():
    draw = torch.Generator().manual_seed(0)
    guesses = torch.randint(0, 10, (200, 500), generator=draw)
    found = [at_chance(100 * float((row == EVEN).float().mean()), EVEN) for row in guesses]
    assert sum(found) >= 190


def test_the_tasks_are_named_and_warned_of(caplog):
    scores = {"a": {"accuracy": 10.4}, "b": {"accuracy": 80.0}}
    with caplog.at_level(logging.WARNING):
        assert of_tasks(scores, [EVEN, EVEN]) == ["a"]
    assert caplog.messages == [warning("a", 10.4, EVEN)]
    assert "right on 10.4 % of its own 500 test images, no better than guessing (10.0 %)" in caplog.text


def test_a_linear_probe_of_one_class_is_refused():
    with pytest.raises(InputError, match=r"probe.linear_images: the 4 images are all of class 3"):
        linear_probe(torch.zeros(4, 2), torch.full((4,), 3), torch.zeros(4, 2), torch.zeros(4), 1e-2)
