import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.runtime.schedule import cycle


@given(steps=st.integers(2, 500), warmup=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_cycle_rises_in_a_line_and_falls_in_a_cosine(steps, warmup):
    found = [cycle(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    assert all(0 < share <= 1 for share in found)
    assert all(b - a == pytest.approx(1 / rising) for a, b in itertools.pairwise(found[:rising]))
    assert all(a > b for a, b in itertools.pairwise(found[rising:]))
    assert max(found) == 1
    if rising < steps:
        assert found[-1] == pytest.approx((1 - math.cos(math.pi / (steps - rising))) / 2)
