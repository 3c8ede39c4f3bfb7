"""dvc.yaml against the code: what each stage depends on, what reruns when something changes, whether dvc.lock fits."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from test_rooms import ROOMS, arrows

ROOT = Path(__file__).parents[1]
STAGES = ["artifacts", "finetune", "statistics", "match", "allocate", "fit", "recalibrate", "probe", "report"]
COMPUTING = STAGES[1:]  # those whose results depend on the versions of libraries
arrows_once = cache(arrows)  # no test looks at a folder, changes it and looks again


@cache
def closure(root: Path, stage: str) -> frozenset[str]:
    """Files of ours that running a stage can load, relative to the top folder; those without content left out."""
    own = arrows_once(root)
    found, todo = set(), [f"stages/{stage}/__main__.py", "stages/__init__.py"]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            # The package's own file loads the notebook face when that is asked for: no stage does.
            todo += [] if file == "stages/__init__.py" else own[file]
    return frozenset(found)


def definitions(root: Path) -> dict[str, dict]:
    """The stages; what the stage `common` names for every fit is a fit's own."""
    found = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    stages = {name: stage.get("do", stage) for name, stage in found.items()}
    common, fit = stages.pop("common"), stages["fit"]
    (file,) = common["outs"]
    assert file in fit["deps"]
    fit["deps"] = [dep for dep in fit["deps"] if dep != file] + common["deps"]
    fit["params"] = fit["params"] + common["params"]
    return stages


def within(path: str, folder: str) -> bool:
    """What DVC fills into the folder's path stands for any name there; `${own}` is a folder of no code."""
    one = re.escape(re.sub(r"\$\{[^}]*\}", "*", folder)).replace(r"/\*", "/[^/]*")
    return re.match(f"{one}(/|$)", path) is not None


def undeclared(root: Path) -> list[str]:
    """What stages import without depending on it."""
    return [
        f"{name}: {file}"
        for name, stage in definitions(root).items()
        for file in sorted(closure(root, name))
        if not any(within(file, dep) for dep in stage["deps"])
    ]


def unused(root: Path) -> list[str]:
    """What stages depend on of the code without importing anything of it."""
    return [
        f"{name}: {dep}"
        for name, stage in definitions(root).items()
        for dep in stage["deps"]
        if within(dep, "stages") and not any(within(file, dep) for file in closure(root, name))
    ]


def lines_of(entry: str | dict) -> list[str]:
    """A key of params.yaml, or those of another file under its name."""
    return [entry] if isinstance(entry, str) else [key for keys in entry.values() for key in keys]


def reruns(changed: str) -> list[str]:
    """Stages that run again when a file or folder, or a key of the parameters, changes: those that name it."""
    return [
        name
        for name, stage in definitions(ROOT).items()
        if any(within(changed, dep) for dep in stage["deps"])
        or any(same_key(changed, key) for entry in stage["params"] for key in lines_of(entry))
    ]


def same_key(one: str, other: str) -> bool:
    """Whether one key is the other or within it; what DVC fills in stands for any name."""
    pairs = zip(one.split("."), re.sub(r"\$\{[^}]*\}", "*", other).split("."), strict=False)
    return all("*" in pair or pair[0] == pair[1] for pair in pairs)


LATER = ["fit", "recalibrate", "probe", "report"]
TRAINED = ["statistics", "match", "allocate", *LATER]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("requirements.txt", COMPUTING),
        ("stages/__init__.py", STAGES),
        ("stages/core/runtime/files.py", STAGES),
        ("stages/core/settings/params.py", STAGES),
        ("stages/core/recipe/methods.py", ["artifacts", "match", "allocate", *LATER]),
        ("stages/core/networks/architectures.py", ["artifacts", "finetune"]),
        ("stages/core/images/formats/pets.py", ["finetune", "statistics", "fit", "recalibrate", "probe"]),
        ("stages/core/images/decoding.py", ["finetune", "statistics", "fit", "recalibrate", "probe"]),
        ("stages/core/tracing/trace.py", ["finetune"]),
        ("stages/core/units/groups.py", ["finetune", "statistics", "match", "allocate", "fit", "recalibrate", "probe"]),
        ("stages/core/graph/rules.py", ["finetune", "statistics", "match", "allocate", "fit", "recalibrate", "probe"]),
        ("stages/core/sweep/sweep.py", ["statistics", "fit", "recalibrate"]),
        ("stages/core/merged/network.py", ["allocate", "fit", "recalibrate", "probe"]),
        ("stages/core/align/alignment.py", ["match", "fit", "recalibrate"]),
        ("stages/core/handover/networks.py",
         ["finetune", "statistics", "match", "allocate", "fit", "recalibrate", "probe"]),
        ("stages/core/handover/calibration.py", ["statistics", "fit", "recalibrate"]),
        ("stages/core/handover/statistics.py", ["statistics", "match", "fit", "recalibrate"]),
        ("stages/core/handover/pairing.py", ["match", "allocate", "fit", "recalibrate"]),
        *((f"stages/{name}/__main__.py", [name]) for name in STAGES),
        ("stages/match/ways/dual.py", ["match"]),
        ("stages/core/align/ways/cca.py", ["match", "fit", "recalibrate"]),
        ("stages/fit/solvers/adam.py", ["fit"]),
        ("stages/recalibrate/ways/tact.py", ["recalibrate"]),
        ("stages/api.py", []),
        # keys of params.yaml
        ("budget", ["allocate", "fit", "report"]),
        ("seed", ["artifacts", "finetune", "statistics", "match", "fit", "report"]),
        ("threads", ["finetune", "statistics", "match", "allocate", "fit", "recalibrate", "probe"]),
        ("ranks", ["statistics", "fit", "recalibrate"]),
        ("device", ["finetune", "statistics", "fit", "recalibrate", "probe"]),
        ("source", ["artifacts"]),
        ("artifacts.endpoint", ["artifacts"]),
        ("finetune.workers", ["finetune"]),
        ("statistics.images", ["statistics"]),
        ("match.weights", ["artifacts", "match", "allocate", "fit", "recalibrate", "report"]),
        ("allocate.levels", ["allocate"]),
        ("allocate.layout", ["allocate"]),
        ("allocate.multiple", ["allocate"]),
        ("allocate.cost", ["allocate", "fit"]),
        ("fit.ridge", ["fit"]),
        ("fit.images", ["fit", "probe"]),
        ("recalibrate.images", ["recalibrate"]),
        ("probe.penalty", ["probe"]),
        ("methods.pleas", ["artifacts", "match", "allocate", "fit", "recalibrate", "probe", "report"]),
        ("full", []),
        ("profiles.*.finetune.epochs",
         ["artifacts", "finetune", "statistics", "fit", "recalibrate", "probe", "report"]),
        ("profiles.*.labels", ["artifacts", *TRAINED]),
    ],
)  # fmt: skip
def test_what_reruns_when_something_changes(changed, expected):
    """A stage behind one of these runs too where what it reads comes out different."""
    assert reruns(changed) == [name for name in STAGES if name in expected]


def test_a_way_of_merging_retrains_nothing():
    """A matching, an option of a fit, the merged network: nothing on the way to the trained networks reads them."""
    for changed in ("merged/network.py", "align/ways/cca.py", "sweep/gram.py"):
        assert not {"artifacts", "finetune"} & {*reruns(f"stages/core/{changed}")}
    assert "finetune" not in reruns("stages/core/recipe/methods.py")
    for key in ("match", "methods", "fit", "allocate", "recalibrate", "statistics", "probe", "budget"):
        assert "finetune" not in reruns(key)


def test_a_stage_depends_on_all_that_it_imports():
    assert not undeclared(ROOT), "add to the deps in dvc.yaml"


def test_a_stage_depends_on_no_code_that_it_does_not_import():
    assert not unused(ROOT)


def test_dependencies_are_rooms():
    for name, stage in definitions(ROOT).items():
        code = [dep for dep in stage["deps"] if within(dep, "stages")]
        allowed = {f"stages/core/{room}" for room in ROOMS} | {f"stages/{name}", "stages/__init__.py"}
        assert all(dep in allowed or dep.startswith("stages/core/handover/") for dep in code), name
        assert "stages/__init__.py" in code
        assert ("requirements.txt" in stage["deps"]) == (name in COMPUTING)


def test_every_stage_has_its_section_and_its_folder():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert not set(STAGES) - {"report"} - set(params)
    assert {path.parent.name for path in (ROOT / "stages").glob("*/__main__.py")} == set(STAGES)
    assert list(definitions(ROOT)) == STAGES


# -- what the tests above guard, broken on purpose in a copy -------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """The code and the pipeline, under git, and nothing that a run left."""
    names = [
        "stages",
        "dvc.yaml",
        "dvc.lock",
        "params.yaml",
        "published.yaml",
        "requirements.txt",
        ".dvc",
        ".dvcignore",
    ]
    tracked = git(ROOT, "ls-files", "-co", "--exclude-standard", "--", *names).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        git(tmp_path, *command)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    who = {
        f"GIT_{one}_{what}": "test@localhost" for one in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    run = subprocess.run(
        ["git", *words], cwd=folder, env=os.environ | who, capture_output=True, text=True, check=True
    )
    return run.stdout


def append(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text()}\n{text}\n")


def test_an_import_outside_its_deps_is_found(copy):
    append(copy / "stages/core/graph/nodes.py", "def late():\n    import stages.core.images.load")
    found = undeclared(copy)
    assert "match: stages/core/images/load.py" in found
    assert not any(line.startswith("report") for line in found)


def test_a_room_that_is_missing_is_found(copy):
    path = copy / "dvc.yaml"
    path.write_text(path.read_text().replace("      - stages/core/align\n", "", 1))
    assert any(line.startswith("match: stages/core/align/") for line in undeclared(copy))


def test_a_room_too_many_is_found(copy):
    path = copy / "dvc.yaml"
    path.write_text(
        path.read_text().replace(
            "      - stages/report\n", "      - stages/report\n      - stages/core/sweep\n"
        )
    )
    assert unused(copy) == ["report: stages/core/sweep"]


@pytest.mark.parametrize(
    ("file", "text", "stage"),
    [
        ("stages/report/plots.py", "# more", "report: stages/report"),
        ("stages/core/align/ways/zip.py", "# more", "match: stages/core/align"),
        ("stages/core/align/new.py", "", "match: stages/core/align"),  # a file that was not there
        ("stages/core/handover/pairing.py", "# more", "match: stages/core/handover/pairing.py"),
        ("requirements.txt", "# more", "finetune: requirements.txt"),
    ],
)  # fmt: skip
def test_a_lock_of_other_code_is_found(file, text, stage, copy):
    before = stale(copy)
    path = copy / file
    path.touch()
    append(path, text)
    git(copy, "add", "-A")
    assert stage in {line.split(" {")[0] for line in set(stale(copy)) - set(before)}


def test_a_lock_of_other_parameters_is_found(copy):
    before = stale(copy)
    path = copy / "params.yaml"
    path.write_text(path.read_text().replace("\nbudget: 1.0", "\nbudget: 1.5", 1))
    assert {line.split(":")[0] for line in set(stale(copy)) - set(before)} >= {"allocate", "report"}


def test_stray_files_do_not_count(copy):
    before = stale(copy)
    for name in (
        "__pycache__/files.cpython-311.pyc",
        ".files.py.swp",
        ".DS_Store",
        "files.py~",
        ".files.tmp",
    ):
        path = copy / "stages/core/runtime" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert stale(copy) == before


# -- dvc.lock ------------------------------------------------------------------------------------------------------


def stale(root: Path) -> list[str]:
    """What dvc.lock was not made with: of the definitions, the parameters and all that no stage makes."""
    found = []
    with Repo(str(root)) as repo:
        made = [out.def_path for stage in repo.index.stages for out in stage.outs]
        for stage in repo.index.stages:
            if stage.changed_stage():
                found.append(f"{stage.name}: its definition")
            for dep in stage.deps:
                own = isinstance(dep, ParamsDependency) or not any(
                    within(dep.def_path, out) or within(out, dep.def_path) for out in made
                )
                if own and dep.status():
                    found.append(f"{stage.name}: {dep.def_path} {dep.status()}")
    return found


def test_lock_matches_the_code_and_the_parameters():
    """What is in git must be what the recorded results were made with; the data need not be here."""
    assert not stale(ROOT), "run dvc repro and commit dvc.lock"


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
