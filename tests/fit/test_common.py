"""What all fits depend on, as one file."""

from pathlib import Path

import pytest
import yaml

from stages.core.runtime.errors import InputError
from stages.fit.common import COMMON, gathered

ROOT = Path(__file__).parents[2]
PIPELINE = """
stages:
  common:
    deps: [code, one.txt]
    params: [budget, allocate.cost, "${from}": ["profiles.${profile}"]]
"""
PARAMS = {
    "budget": 1.0,
    "seed": 0,
    "profile": "a",
    "from": "params.yaml",
    "allocate": {"cost": "macs", "levels": 8},
}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "code/inner").mkdir(parents=True)
    (tmp_path / "code/inner/a.py").write_text("a")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    change(tmp_path)
    return tmp_path


def change(project, **more):
    profiles = {"a": {"classes": more.pop("classes", 2)}, "b": {"classes": more.pop("others", 3)}}
    (project / "params.yaml").write_text(yaml.safe_dump(PARAMS | {"profiles": profiles} | more))


def test_the_file_says_what_it_is_made_of(project):
    found = gathered(project)
    assert set(found["files"]) == {"code/inner/a.py", "one.txt"}
    assert found["params"] == {
        "params.yaml": {"budget": 1.0, "allocate.cost": "macs", "profiles.a": {"classes": 2}}
    }


@pytest.mark.parametrize(
    "changed", [{"budget": 1.5}, {"allocate": {"cost": "parameters"}}, {"classes": 4}, {"profile": "b"}]
)
def test_another_value_is_another_file(project, changed):
    before = gathered(project)
    change(project, **changed)
    assert gathered(project) != before


@pytest.mark.parametrize("changed", [{"seed": 1}, {"allocate": {"cost": "macs", "levels": 9}}, {"others": 4}])
def test_a_value_that_no_fit_reads_is_not(project, changed):
    before = gathered(project)
    change(project, **changed)
    assert gathered(project) == before


FILES = [
    ("code/inner/a.py", True),
    ("code/new.py", True),
    ("one.txt", True),
    ("code/__pycache__/a.pyc", False),
    ("code/.a.py.swp", False),
]


@pytest.mark.parametrize(("name", "counts"), FILES)
def test_another_file_is_another_file(project, name, counts):
    before = gathered(project)
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("changed")
    assert (gathered(project) != before) == counts


def test_the_pipeline_has_the_stage_and_its_file():
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["common"]
    assert stage["outs"] == [str(COMMON)]
    found = gathered(ROOT)
    for dep in stage["deps"]:
        assert any(file == dep or file.startswith(f"{dep}/") for file in found["files"]), dep
    assert "budget" in found["params"]["params.yaml"]


def test_a_pipeline_without_the_stage_is_one_line(project):
    (project / "dvc.yaml").write_text("stages: {}")
    with pytest.raises(InputError, match=r"dvc.yaml: found no stage common; allowed: "):
        gathered(project)
