"""docs/adding.md, followed."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from stages.core.graph import operations
from stages.core.tracing import reading
from stages.core.tracing.calls import joins
from stages.core.tracing.trace import trace
from stages.core.tracing.verify import verify

PAGE = Path(__file__).parents[3] / "docs/adding.md"


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.i0e(x)


def test_an_operation_is_added_as_the_page_says(monkeypatch):
    page = PAGE.read_text()
    assert len(page.splitlines()) <= 26
    name = page.partition('UNARY = ("')[2].partition('"')[0]
    assert name not in operations.OPERATIONS
    monkeypatch.setitem(operations.OPERATIONS, name, operations._aten(name))
    monkeypatch.setitem(reading.CALLS, name, partial(joins._elementwise, name=name))
    network = nn.Sequential(nn.Linear(4, 5), Bessel(), nn.Linear(5, 2)).double()
    verify(network, trace(network, torch.zeros(2, 4)), torch.zeros(2, 4))


def test_the_names_on_the_page_are_there():
    page = PAGE.read_text()
    for rule in ("same", "spatial", "reduced", "channels", "linear", "moved"):
        assert f"`{rule}`" in page
        assert hasattr(operations.moves if rule == "moved" else operations.rules, rule)
    assert hasattr(reading.Reader, "node")
    kinds = page.partition("`calls/`: ")[2].partition(".")[0].replace("`", "").split(", ")
    folder = Path(reading.__file__).parent / "calls"
    assert sorted(kinds) == sorted(path.stem for path in folder.glob("[a-z]*.py"))
