"""inspect: the groups of a network as a table, counted by hand."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from stages import inspect
from stages.core.graph.source import Task
from stages.core.merged.network import MergedNetwork
from stages.core.runtime.errors import InputError
from stages.core.tracing.trace import trace

ROOT = Path(__file__).parents[1]


class Residual(nn.Module):
    """(n, 3) -> (n, 2): a stream of 5 units around a block of 7."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_layers_and_costs_of_each_group_are_those_counted_by_hand():
    found = inspect(Residual(), torch.zeros(4, 3))
    assert (found.network, found.macs) == ("Residual", 15 + 35 + 35 + 10)
    assert found.parameters == 95 + 5 + 7 + 5 + 2
    seen = [(g.name, g.size, g.fixed, g.written_by, g.read_by, g.macs) for g in found.groups]
    assert seen == [
        ("input", 3, True, (), ("stem",), 0),
        ("stem", 5, False, ("stem", "down"), ("up", "head"), 15 + 35 + 35 + 10),
        ("up", 7, False, ("up",), ("down",), 35 + 35),
        ("head", 2, True, ("head",), (), 0),
    ]


def multiply_accumulates(network, x):
    """Counted by torch while the network runs on one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x[:1])
    return counter.get_total_flops() // 2


def test_separating_a_group_adds_what_it_decides(small, images):
    """Counted while networks of two sources run that keep one group separate and share the others."""
    network, x = small(0), images()
    found, traced, tasks = inspect(network, x), trace(network, x), [Task(n, ("0", "1", "2")) for n in "ab"]
    assert found.macs == multiply_accumulates(network, x)
    whole = {group.name: group.size for group in found.groups if not group.fixed}
    assert whole == {name: group.size for name, group in traced.spec.free.items()}
    for group in found.groups:
        if not group.fixed:
            merged = MergedNetwork(traced, tasks, "shared", {**whole, group.name: 0}, {}, {}).double()
            assert multiply_accumulates(merged, x) == found.macs + group.macs, group.name


def test_units_inside_heads_are_told():
    found = inspect(VisionTransformer(32, 8, 1, 4, 32, 64, num_classes=5), torch.zeros(1, 3, 32, 32))
    (heads,) = [group for group in found.groups if group.inside]
    assert (heads.size, heads.inside) == (4, (8, 8))
    assert "4 x 8 x 8" in str(found)


def test_as_text_it_is_a_table_with_a_line_for_each_group():
    head, _, columns, rule, *lines = str(inspect(Residual(), torch.zeros(4, 3))).split("\n")
    assert head == "Residual: 95 multiply-accumulates, 114 parameters"
    assert re.split(r" {2,}", columns.strip()) == ["group", "units", "written by", "read by", "MACs", "share"]
    assert set(rule) == {"-", " "}
    assert [re.split(r" {2,}", line.strip()) for line in lines] == [
        ["input", "3", "stem", "fixed"],
        ["stem", "5", "stem, down", "up, head", "95", "100.0%"],
        ["up", "7", "up", "down", "70", "73.7%"],
        ["head", "2", "head", "fixed"],
    ]


def test_long_lists_of_layers_are_cut_in_the_table_alone():
    layers = [nn.Linear(3, 4), *(nn.Sequential(nn.Linear(4, 4)) for _ in range(5)), nn.Linear(4, 2)]

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            first, *blocks, last = self.layers
            x = first(x)
            for block in blocks:
                x = x + block(x)
            return last(x)

    found = inspect(Stream(), torch.zeros(1, 3))
    assert len(found.groups[1].written_by) == 6
    assert "layers.0, layers.1.0, layers.2.0 and 3 more" in str(found)


def test_the_network_is_left_alone(small, images):
    network = small(0).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inspect(network, images())
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.first(x).cumsum(1))


@pytest.mark.parametrize(
    ("network", "example", "message"),
    [
        (Sorted(), torch.zeros(1, 3), "cumsum"),
        (Residual(), torch.zeros(1, 4), "Residual on images of n x 4"),
        (Residual(), torch.zeros(0, 3), "example: found Tensor; allowed: a tensor of one image or more"),
        (Residual(), [1.0], "example: found list; allowed"),
        (
            torch.relu,
            torch.zeros(1, 3),
            "network: found builtin_function_or_method; allowed: a torch.nn.Module",
        ),
    ],
)
def test_a_network_that_cannot_be_merged_is_refused_in_one_line(network, example, message):
    with pytest.raises(InputError, match=message) as caught:
        inspect(network, example)
    assert "\n" not in str(caught.value)


def test_the_lines_of_the_readme_run(capsys):
    (lines,) = re.findall(
        r"```python\n(from stages import inspect\n.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    net_a, images = Residual(), torch.zeros(2, 3)
    exec(lines, {"net_a": net_a, "images": images})
    assert capsys.readouterr().out == f"{inspect(net_a, images)}\n"
