"""dvc.yaml against the code: what each stage depends on, what it may import, and whether dvc.lock belongs to it."""

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo

ROOT = Path(__file__).parents[1]
STAGES = ["artifacts", "finetune", "statistics", "match", "allocate", "fit", "recalibrate", "probe", "report"]


def imports(path: Path) -> set[str]:
    """Names of all modules a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def source(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


@cache
def closure(module: str) -> frozenset[str]:
    """Files of the project that importing a module can load, relative to its top folder; empty ones left out."""
    found: set[str] = set()
    todo = [module]
    while todo:
        path = source(todo.pop())
        name = str(path.relative_to(ROOT)) if path else None
        if path and name not in found:
            found.add(name)
            todo += [other for other in imports(path) if other.split(".")[0] == "stages"]
    return frozenset(name for name in found if (ROOT / name).stat().st_size)


def definition(name: str) -> dict:
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    return found.get("do", found)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_every_file_it_imports(name):
    missing = closure(f"stages.{name}.__main__") - set(definition(name)["deps"])
    assert not missing, f"add to the deps of {name} in dvc.yaml: {sorted(missing)}"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_no_file_it_does_not_import(name):
    code = {dep for dep in definition(name)["deps"] if dep.endswith(".py")}
    assert code <= closure(f"stages.{name}.__main__")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_itself_and_core_only(name):
    others = [other for other in STAGES if other != name]
    foreign = [file for file in closure(f"stages.{name}.__main__") if file.split("/")[1] in others]
    assert not foreign


def test_core_imports_no_stage():
    for path in (ROOT / "stages/core").glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0:2][-1] in STAGES}, path


def test_every_stage_has_its_section_and_its_folder():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name in set(STAGES) - {"report"}:
        assert name in params
    assert {path.parent.name for path in (ROOT / "stages").glob("*/__main__.py")} == set(STAGES)


def test_lock_matches_the_code_and_the_parameters():
    """What is tracked by git must be what the recorded results were made with; the data need not be here."""
    tracked = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    )
    stale = []
    with Repo(str(ROOT)) as repo:
        for stage in repo.index.stages:
            if stage.changed_stage():
                stale.append(f"{stage.addressing}: its definition")
            for dep in stage.deps:
                if (isinstance(dep, ParamsDependency) or dep.def_path in tracked) and dep.status():
                    stale.append(f"{stage.addressing}: {dep.def_path} {dep.status()}")
    assert not stale, "run dvc repro and commit dvc.lock: " + "; ".join(stale)


def test_lock_is_one_run():
    """A stage's recorded inputs are what the stages before it recorded as outputs."""
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])}
    for name, stage in lock.items():
        for dep in stage["deps"]:
            if dep["path"] in outs:
                assert dep["md5"] == outs[dep["path"]], f"{name}: {dep['path']}"


def test_lock_has_no_stage_that_is_gone():
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    with Repo(str(ROOT)) as repo:
        assert set(lock) == {stage.addressing for stage in repo.index.stages}


def test_no_import_url_makes_a_run_ask_the_network():
    assert not [path for path in ROOT.rglob("*.dvc") if path.is_file() and ".venv" not in path.parts]
