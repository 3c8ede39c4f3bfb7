"""The package: installed in an environment of its own, without the network, and used from another folder."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A new environment that sees the packages of the running one, with the project as `pip install -e .` leaves it.

    What building writes beside the sources stays in a copy of what a build reads.
    """
    folder = tmp_path_factory.mktemp("install")
    project = folder / "project"
    project.mkdir()
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "requirements.txt",
        "requirements-test.txt",
        "stages",
    ):
        (project / name).symlink_to(ROOT / name)
    (project / "tests").mkdir()  # other folders with code in them are none of the package's
    (project / "tests/__init__.py").touch()
    venv.create(folder / "new", with_pip=False)
    found = folder / "new/bin/python"
    (site,) = (folder / "new/lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "running.pth").write_text("\n".join(others))
    subprocess.run(
        [
            found,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "-e",
            project,
        ],
        check=True,
        cwd=folder,
        capture_output=True,
    )
    return found


def said(python, code: str, cwd: Path) -> str:
    return subprocess.run(
        [python, "-c", code], check=True, cwd=cwd, capture_output=True, text=True, env={}
    ).stdout


def test_it_is_imported_from_any_folder(python, tmp_path):
    code = (
        "from stages import inspect, load_merged, merge\n"
        "print(*(f.__module__ for f in (inspect, load_merged, merge)))"
    )
    assert said(python, code, tmp_path) == "stages.inspection stages.core.merged.file stages.api\n"


def test_it_holds_the_stages_and_their_types_and_nothing_else(python, tmp_path):
    code = (
        "from importlib.util import find_spec; from importlib.resources import files\n"
        "print(files('stages').joinpath('py.typed').is_file(), find_spec('tests'), find_spec('README'))"
    )
    assert said(python, code, tmp_path) == "True None None\n"


def test_it_needs_what_the_pipeline_needs(python, tmp_path):
    code = (
        "from importlib.metadata import requires; from packaging.requirements import Requirement as R\n"
        "for r in map(R, requires('pleas-merging')): print(bool(r.marker), r.name, sorted(r.extras), r.specifier)"
    )
    expected = {
        f"{marked} {own.name} {sorted(own.extras)} {own.specifier}"
        for marked, name in ((False, "requirements.txt"), (True, "requirements-test.txt"))
        for own in map(Requirement, (ROOT / name).read_text().splitlines())
    }
    assert set(said(python, code, tmp_path).splitlines()) == expected
