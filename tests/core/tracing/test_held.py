"""What no rule keeps in another order is held: fixed, told in the log, while everything else stays free."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.core.graph.compare import always_shared
from stages.core.graph.source import Task
from stages.core.runtime.errors import InputError
from stages.core.tracing.sources import make_sources
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify


class Stream(nn.Module):
    """(n, 3, 8, 8) -> (n, 4): a layer, ``body`` on its 6 units, two layers more."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3), body
        self.next, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(F.relu(self.next(self.body(self.stem(x)))).mean((2, 3)))


BODIES = {
    "a mean that drops channels": (
        lambda x: x * x.mean(1).sum((1, 2))[:, None, None, None],
        "mean over the units",
    ),
    "sorted": (lambda x: x.sort(1)[0], "sort along the units"),
    "units with units": (lambda x: x @ x.transpose(1, 2).transpose(1, 3), "matmul"),
    "a transform of channels": (lambda x: torch.fft.fft(x, dim=1).abs(), "fourier over the units"),
    "resized channels": (
        lambda x: F.interpolate(x.transpose(1, 3), size=(6, 6)).transpose(1, 3)[:, :6],
        "interpolate",
    ),
}


@pytest.mark.parametrize("what", BODIES)
def test_units_before_are_fixed_those_behind_are_free_and_the_log_says_why(what, caplog):
    body, words = BODIES[what]
    network, x = Stream(body).double(), torch.randn(2, 3, 8, 8).double()
    with caplog.at_level(logging.WARNING):
        traced = trace(network, x)
    verify(network, traced, x)
    assert {name: group.size for name, group in traced.spec.free.items()} == {"next": 5}
    tasks = [Task(name, tuple("wxyz")) for name in "ab"]
    sources = make_sources([network, Stream(body).double()], tasks, x, "shared")
    assert always_shared(sources) == ["stem.weight", "stem.bias"]
    told = [record.message for record in caplog.records if record.name.endswith("graph.held")]
    assert words in told[0]
    assert told[0].endswith("its units keep their order and are shared")


def test_where_nothing_else_is_free_the_network_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), Sorted(), nn.Flatten(), nn.Linear(6 * 36, 4))
    with pytest.raises(InputError, match="sort along the units"):
        trace(network, torch.randn(2, 3, 8, 8))


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(1)[0]
