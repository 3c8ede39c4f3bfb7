"""A quick sample of each campaign; `python -m tests.campaigns NAME --times N` runs as many as one likes."""

import random

import pytest

from tests.campaigns.__main__ import run
from tests.campaigns.rule import Bad, damaged, held

SAMPLE = {"merged": 40, "checkpoint": 40, "image": 12, "archive": 15, "s3": 6, "params": 100, "api": 20}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_bad_inputs_is_taken_well(name):
    found, bad = run(name, SAMPLE[name], seed=0)
    assert not bad, bad
    assert found["refused"]
    assert found["read"]  # else nothing that is sound was among them


def test_the_rule_finds_what_is_bad():
    def traceback():
        raise KeyError("x")

    with pytest.raises(Bad, match="KeyError"):
        held(traceback)
    assert held(lambda: 3) == ("read", 3)


def test_an_accident_changes_the_bytes():
    content = bytes(range(256)) * 20
    changed = [damaged(random.Random(seed), content) for seed in range(100)]
    assert sum(own != content for own in changed) > 90
