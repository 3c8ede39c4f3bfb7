"""The notebook face on plain torch modules."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from stages import load_merged, merge
from stages.core.recipe.known import FILE, known_methods
from stages.core.recipe.methods import Refine
from stages.core.runtime.errors import InputError


class Plain(nn.Module):
    """A network that no registry knows."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.values = nn.Linear(width, classes)  # a name that nn.ModuleDict has itself

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.relu(self.second(x))
        return self.values(x.mean((2, 3)))


def networks(classes=(3, 3)):
    found = {}
    for index, (name, count) in enumerate(zip("ab", classes, strict=True)):
        torch.manual_seed(index)
        found[name] = Plain(classes=count)
    return found


def batches(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(count)] for name in "ab"}


@pytest.mark.parametrize("budget", [1, 1.3, 2.0])
def test_a_merged_network_keeps_the_budget_and_runs(budget):
    merged = merge(networks(), batches(), budget=budget, progress=False)
    assert merged(torch.randn(5, 1, 6, 6)).shape == (5, 3)
    assert 1 <= merged.about["budget"]["reached"] <= budget


def test_the_networks_are_left_alone():
    given = networks()
    given["a"].train()
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in given.items()}
    merge(given, batches(), progress=False)
    assert given["a"].training
    for name, net in given.items():
        assert all(torch.equal(v, before[name][k]) for k, v in net.state_dict().items())


def test_labels_that_come_with_the_batches_are_not_looked_at():
    plain = merge(networks(), batches(), budget=1.2, progress=False)
    labelled = {name: [(x, torch.full((8,), 99)) for x in own] for name, own in batches().items()}
    other = merge(networks(), labelled, budget=1.2, progress=False)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in plain.state_dict().items())


def test_heads_of_other_widths_are_separate_label_spaces():
    merged = merge(networks((3, 4)), batches(), budget=1.2, progress=False)
    x = torch.randn(5, 1, 6, 6)
    assert merged(x).shape == (5, 7)
    assert torch.equal(merged(x, task="b"), merged(x)[:, 3:])


def test_a_saved_network_gives_equal_outputs_in_a_fresh_process(tmp_path):
    merged = merge(networks(), batches(), budget=1.4, progress=False)
    merged.save(tmp_path / "merged.safetensors")
    x = torch.randn(5, 1, 6, 6)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from stages import load_merged; torch.set_num_threads(1); "
        "torch.save(load_merged(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])"
    )
    paths = [str(tmp_path / name) for name in ("merged.safetensors", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)
    assert torch.equal(torch.load(paths[2]), merged(x))
    assert load_merged(paths[0]).about["budget"]["asked"] == 1.4


QUICK = {"steps": 4, "every": 2, "batch_size": 4}


def test_a_row_of_the_full_list_by_name_is_what_its_parts_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no params.yaml here
    by_name = merge(networks(), batches(), 1.2, "pleas", progress=False)
    parts = {"match": {"by": "activations"}, "fit": {"inputs": "source", "targets": "ensemble"}}
    by_parts = merge(networks(), batches(), 1.2, parts, progress=False)
    assert same(by_name, by_parts)


def test_what_a_mapping_leaves_out_is_that_of_progressive():
    fit = {"inputs": "merged", "targets": "own", "norm": "fold"}
    whole = merge(networks(), batches(), 1.2, {"match": {"by": "weights"}, "fit": fit}, progress=False)
    short = merge(networks(), batches(), 1.2, {"match": "weights"}, progress=False)
    assert same(whole, short)


def same(one, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def data_loader(images, count):
    labels = torch.zeros(len(images), dtype=torch.int64)
    return DataLoader(TensorDataset(images, labels), batch_size=count)


class OneByOne(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)

    def __len__(self):
        return len(self.images)


FORMS = {
    "tensor": lambda own: torch.cat(own),
    "DataLoader": lambda own: data_loader(torch.cat(own), 16),
    "mapping": lambda own: [{"pixel_values": torch.cat(own), "labels": torch.zeros(16, dtype=torch.int64)}],
    "batch of a DataLoader": lambda own: next(iter(data_loader(torch.cat(own), 16))),
    "batch with names": lambda own: (torch.cat(own), torch.zeros(16), ["name"] * 16),
    "IterableDataset that knows its length": lambda own: OneByOne(torch.cat(own)),
    "list": lambda own: [[torch.cat(own), ["name"] * 16]],
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_in_any_form(form):
    expected = merge(networks(), {name: [torch.cat(own)] for name, own in batches().items()}, progress=False)
    given = {name: FORMS[form](own) for name, own in batches().items()}
    assert same(expected, merge(networks(), given, progress=False))


def test_options_are_those_of_the_stages():
    plain = merge(networks(), batches(), 1.3, progress=False)
    said = {
        "seed": 0,
        "ridge": "auto",
        "positions": 1.0,
        "precision": "float32",
        "memory": 8.0,
        "allocate": {},
    }
    assert same(plain, merge(networks(), batches(), 1.3, options=said, progress=False))
    for change in ({"ridge": 1.0}, {"positions": 0.3}, {"precision": "float16"}):
        assert not same(plain, merge(networks(), batches(), 1.3, options=change, progress=False))
    other = merge(networks(), batches(), 1.3, options={"allocate": {"cost": "parameters"}}, progress=False)
    assert other.about["budget"]["counted"] == "parameters"


def test_too_little_memory_is_said_before_the_work():
    with pytest.raises(InputError, match=r"statistics.*: needs .* GiB"):
        merge(networks(), batches(), options={"memory": 1e-6}, progress=False)


def test_the_report_says_widths_residuals_and_costs(tmp_path):
    merged = merge(networks(), batches(), 1.4, progress=False)
    merged.save(tmp_path / "merged.safetensors")
    table = merged.report()
    assert table.equals(load_merged(tmp_path / "merged.safetensors").report())
    assert list(table.index) == ["first", "second", "values", "whole network"]
    widths = table.loc[["first", "second", "values"]]
    assert (widths["units"] == [6, 6, 3]).all()
    assert (widths["merged"] == widths["shared"] + 2 * widths["separate"]).all()
    assert (widths["macs"] == [36 * 9 * 6, 36 * 9 * 36, 18]).all()
    assert ((widths["residual"] > 0) & (widths["residual"] < 1)).all()
    whole = table.loc["whole network"]
    assert whole["counted"] == pytest.approx(merged.about["budget"]["reached"], abs=1e-4)
    assert 1 < whole["counted"] <= whole["executed"] <= 2


def test_a_report_counts_what_a_run_multiplies():
    """Of a plain network, by torch's own counter, which knows no merged layers."""
    merged = merge(networks(), batches(), 2.0, progress=False)
    x = torch.zeros(1, 1, 6, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged(x)
    whole = merged.report().loc["whole network"]
    assert whole["executed"] * whole["macs"] == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_a_refined_report_says_what_was_kept():
    fit = {"solver": "average", "refine": {**QUICK, "images": 16}}
    last = merge(networks(), batches(), method={"fit": fit}, progress=False).report().iloc[-1]
    assert last.name == "refining: step 0 of 4 kept"
    assert last["residual"] == 1


def test_a_refined_row_says_what_it_saw_and_kept(tmp_path):
    fit = {"inputs": "merged", "targets": "own", "norm": "fold", "refine": {**QUICK, "images": 12}}
    merged = merge(networks(), batches(), method={"match": "activations", "fit": fit}, progress=False)
    merged.save(tmp_path / "merged.safetensors")
    found = load_merged(tmp_path / "merged.safetensors").about["refined"]
    assert found == merged.about["refined"]
    assert found["images"] == {name: {"calibration": 12, "held_out": 1} for name in "ab"}
    assert found["kept"] == 0  # one image held out is too few
    assert [step for step, _ in found["curve"]] == [0, 2, 4]


@pytest.mark.parametrize("name", ["progressive_refined", "average_refined"])
def test_refined_rows_run_by_name(name, monkeypatch):
    row = known_methods().methods[name]
    quick = row.model_copy(update={"fit": row.fit.model_copy(update={"refine": Refine(**QUICK)})})
    monkeypatch.setitem(known_methods().methods, name, quick)
    merged = merge(networks((3, 2)), batches(), method=name, progress=False)
    assert merged.about["method"]["fit"]["refine"]["steps"] == 4
    assert merged(torch.randn(5, 1, 6, 6)).shape == (5, 5)


def test_the_packaged_rows_are_those_of_the_parameters():
    found = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    packaged = yaml.safe_load(FILE.read_text())
    assert packaged == {key: found[key] for key in ("match", "full")}, "copy match and full to known.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 2.5}, "budget: found 2.5"),
        ({"budget": "1.2"}, "budget: found '1.2'"),
        ({"budget": float("nan")}, "budget: found nan"),
        ({"labels": "mine"}, "labels: found 'mine'"),
        ({"method": "magic"}, "method: found 'magic'; allowed: .* more, or a mapping"),
        ({"method": 3}, "method: found 3; allowed: a name"),
        ({"method": "pleas_free"}, "method: found data: proxy"),
        ({"method": {"fit": {"refine": {"step": 3}}}}, "fit.refine.step: unknown key; allowed: steps"),
        ({"method": {"match": "luck", "fit": {}}}, "match: found 'luck'; allowed: .* more, or a mapping"),
        ({"method": {"fit": {"solver": "magic"}}}, "solver: found 'magic'"),
        (
            {"method": {"fit": {"solvr": "exact"}}},
            "fit: solvr: not a setting of solver: exact; allowed: solver",
        ),
        ({"method": {"match": {"by": "luck"}}}, "by: found 'luck'"),
        ({"method": {"recalibrate": "no"}}, "recalibrate: found 'no'"),
        ({"options": {"sead": 1}}, "options.sead: unknown key; allowed: images, seed, ridge"),
        ({"options": {"precision": "int8"}}, "options.precision: found 'int8'"),
        (
            {"batches": {"a": [{"x": torch.ones(2, 3), "y": torch.ones(2, 3)}], "b": []}},
            "task a: Plain on images of n x 3",
        ),
        ({"batches": {"a": ["cat.png"], "b": []}}, "batches: task a: found str; allowed: tensors"),
        ({"batches": {"a": [torch.ones(3)], "b": []}}, "task a: Plain on images of n"),
        ({"batches": {"a": []}}, "batches: found tasks"),
        ({"batches": {"a": [], "b": []}}, "task a has none"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, message):
    arguments = {"networks": networks(), "batches": batches(), "progress": False} | change
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        merge(**arguments)
    assert "\n" not in str(error.value)


def test_another_architecture_is_named():
    other = {"a": Plain(), "b": Plain(width=5)}
    with pytest.raises(InputError, match=r"task b: .*; allowed: networks of one architecture"):
        merge(other, batches(), progress=False)


def test_an_operation_without_a_rule_is_named():
    class Odd(Plain):
        def forward(self, x):
            return super().forward(torch.linalg.matrix_exp(x))

    with pytest.raises(InputError, match="no rule for linalg_matrix_exp"):
        merge({"a": Odd(), "b": Odd()}, batches(), progress=False)
