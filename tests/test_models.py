"""The quick networks of the table (tests/models.py), and the page that is made from it."""

import pytest
import torch
from torch import nn

from models import MODELS, PAGE, Model, lines, outcome, told, write

QUICK = [name for name, model in MODELS.items() if model.quick]


def without_seconds(line):
    return line.rstrip("| ").rpartition("|")[0]


@pytest.mark.parametrize("name", QUICK)
def test_a_network_passes_the_gates_and_the_page_says_what_was_found(name):
    found = outcome(MODELS[name])
    said = lines(PAGE.read_text()).get(name, "no line")
    again = f"run: python tests/models.py --quick {name.split()[0]}"
    assert without_seconds(said) == without_seconds(told(name, MODELS[name], found)), again


def test_the_page_has_networks_in_the_order_of_the_table():
    """Those of the gate, and of the others those that were run."""
    found = list(lines(PAGE.read_text()))
    assert found == [name for name in MODELS if name in found]
    assert set(QUICK) <= set(found)


def test_the_page_has_no_network_refused_that_should_not_be():
    for name, line in lines(PAGE.read_text()).items():
        assert ("refused" in line.split("|")[4]) == bool(MODELS[name].refused), name


class Alike(nn.Module):
    """With a call that has no rule."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.special.erfcx(self.first(x)))


def test_what_has_no_rule_gives_the_line_that_says_so():
    model = Model(
        lambda: nn.Sequential(nn.Flatten(), Alike()), (1, 2, 2), refused="no rule for special_erfcx"
    )
    assert model.refused in outcome(model)
    assert "| refused | " in told("alike", model, outcome(model))


def test_lines_are_put_where_they_belong(monkeypatch, tmp_path):
    page = tmp_path / "families.md"
    page.write_text(PAGE.read_text())
    monkeypatch.setattr("models.PAGE", page)
    name = QUICK[0]
    write({name: f"| {name} | new | | | | |"})
    assert lines(page.read_text()) == {**lines(PAGE.read_text()), name: f"| {name} | new | | | | |"}
    assert page.read_text().partition("<!--")[0] == PAGE.read_text().partition("<!--")[0]


def test_a_gate_that_fails_is_seen(monkeypatch):
    """With one layer of the merged network wrong by a little."""
    fill = torch.no_grad()(lambda network, sources: next(network.parameters()).add_(1e-6))
    whole = __import__("gates").fill_average
    monkeypatch.setattr("gates.fill_average", lambda n, s: (whole(n, s), fill(n, s)))
    with pytest.raises(AssertionError, match=r"at 1\.0: .* apart"):
        outcome(MODELS[QUICK[0]])
