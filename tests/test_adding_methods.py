"""A new way of matching or solving is one file and a line of params.yaml; the page that says so is followed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adding import follow, shell
from test_pipeline import undeclared
from test_rooms import circles, wrong_arrows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adding")
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "published.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    follow(folder, shell(folder))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = {str(path.relative_to(folder)) for path in after if before.get(path) != after[path]}
    assert changed == {"stages/fit/solvers/scaled.py", "stages/match/ways/energy.py", "params.yaml"}
    return folder


def said(copy: Path, code: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


ROWS = """
from stages.core.recipe.recipe import load_recipe
from stages.core.recipe.rooms import check_rows
from stages.core.runtime.errors import InputError
from stages.core.settings.params import load_params
try:
    check_rows(load_recipe(load_params()))
except InputError as error:
    print(error)
"""


def test_the_new_rows_are_checked_with_the_others(copy):
    assert said(copy, ROWS) == ""
    params = copy / "params.yaml"
    text = params.read_text()
    try:
        params.write_text(text.replace("step: 0.9", "step: 1.9"))
        assert said(copy, ROWS).startswith(
            "params.yaml: methods.scaled.fit: step: found 1.9 (float); allowed: less"
        )
        params.write_text(text.replace("step: 0.9", "stop: 0.9"))
        expected = (
            "params.yaml: methods.scaled.fit: stop: not a setting of solver: scaled; allowed: solver, inputs"
        )
        assert said(copy, ROWS).startswith(expected)
    finally:
        params.write_text(text)


MERGE = """
import torch
from torch import nn
from stages import merge
torch.set_num_threads(1)
def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 12, bias=False), nn.ReLU(), nn.Linear(12, 3, bias=False))
nets = {"a": net(0), "b": net(1)}
batches = {name: [torch.randn(16, 20)] for name in nets}
x = torch.cat([own[0] for own in batches.values()])
wanted = sum(net(x) for net in nets.values()) / 2
for fit in ({"solver": "average"}, {"solver": "scaled", "inputs": "merged"}):
    merged = merge(nets, batches, method={"match": {"by": "energy"}, "fit": fit}, progress=False)
    print(float((merged(x) - wanted).square().sum()))
"""


def test_the_new_ways_merge(copy):
    """The first layer's scales are 1, its targets being what the average gives; the last layer's are the best."""
    average, scaled = map(float, said(copy, MERGE).split())
    assert scaled < average


def test_the_new_files_keep_the_order_of_the_house(copy):
    assert not wrong_arrows(copy)
    assert not circles(copy)
    assert not undeclared(copy)
