"""A user's checkpoints and images stay the user's: whatever command runs or is stopped, git never holds them."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from test_custom import put_files
from test_end_to_end import ROOT, Clone, stages_run

pytestmark = pytest.mark.slow
OWN = ["-S", "source=local", "-S", "profile=custom"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with two networks and their images in data/own, and the same in a folder elsewhere."""
    folder = tmp_path_factory.mktemp("own")
    clone = Clone(folder / "clone")
    clone.elsewhere = folder / "elsewhere"
    put_files(clone.elsewhere)
    shutil.copytree(clone.elsewhere, clone.folder / "data/own", dirs_exist_ok=True)
    yield clone
    clone.run("dvc", "queue", "stop", "--kill")


@pytest.fixture(autouse=True)
def nothing_in_git(clone):
    """Before and after each test: no file of the user's is an object of git's, wherever one could look."""
    clone.run("git", "checkout", "-q", "-f", "main")
    clone.run("git", "reset", "-q", "--hard")
    yield
    files = [path for path in clone.elsewhere.rglob("*") if path.is_file()]
    names = "\n".join(map(str, files))
    for command in (["hash-object", "--stdin-paths"], ["cat-file", "--batch-check"]):
        run = subprocess.run(
            ["git", *command], cwd=clone.folder, env=clone.env, input=names, capture_output=True, text=True
        )
        names = run.stdout
    assert len(names.splitlines()) == len(files)
    assert all(line.endswith("missing") for line in names.splitlines())
    assert "data/own" not in clone.run("git", "status", "--porcelain", "-uall")
    assert "data/own/first" not in clone.run("git", "log", "--all", "-g", "--name-only", "--format=")


def taken(clone, folder=None) -> bool:
    """Whether the stage has put the user's files where the others read them."""
    path, own = clone.folder / "models/artifacts/second.pth", folder or clone.folder / "data/own"
    return path.is_file() and path.read_bytes() == (own / "second.pth").read_bytes()


def test_repro(clone):
    clone.change(source="local", profile="custom")
    clone.run("dvc", "repro", "artifacts")
    assert taken(clone)


def test_an_experiment_in_the_workspace(clone):
    clone.run("dvc", "exp", "run", "-f", *OWN, "artifacts")
    assert taken(clone)
    assert clone.run("git", "stash", "list") == ""
    assert clone.run("git", "symbolic-ref", "HEAD").strip() == "refs/heads/main"


def test_a_change_in_the_files_runs_the_stage_again(clone):
    command = ["dvc", "exp", "run", *OWN, "-S", f"own={clone.elsewhere}", "artifacts"]
    clone.run(*command)
    assert not stages_run(clone.run(*command))
    (clone.elsewhere / "second.pth").write_bytes((clone.elsewhere / "first.pth").read_bytes())
    assert stages_run(clone.run(*command)) == {"artifacts"}
    assert taken(clone, clone.elsewhere)


@pytest.mark.parametrize("form", ["temp", "queue"])
def test_an_experiment_elsewhere_finds_them_by_their_absolute_path(form, clone):
    command = ["dvc", "exp", "run", f"--{form}", "-n", f"{form}-run", *OWN, "-S", f"own={clone.elsewhere}"]
    clone.run(*command, "artifacts")
    if form == "queue":
        clone.run("dvc", "queue", "start")
        end = time.monotonic() + 120
        while "Success" not in (status := clone.run("dvc", "queue", "status")) and time.monotonic() < end:
            assert "Failed" not in status
            time.sleep(1)
    (ref,) = clone.run("git", "for-each-ref", "--format=%(refname)", f"refs/exps/**/{form}-run").split()
    clone.run("git", "checkout", "-q", ref, "--", "dvc.lock", "params.yaml")
    clone.run("dvc", "checkout", "--force", "models/artifacts")
    assert taken(clone, clone.elsewhere)


def test_an_experiment_elsewhere_says_what_to_do_where_the_path_is_not_absolute(clone):
    output = clone.run("dvc", "exp", "run", "--temp", *OWN, "artifacts", fails=True)
    assert f"-S own={clone.folder}/data/own" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("moment", ["at once", "in the stage"])
def test_a_killed_experiment_goes_on_as_documented(moment, clone):
    process = clone.start("dvc", "exp", "run", "-f", *OWN, "artifacts")
    if moment == "at once":
        time.sleep(1.5)
    else:
        while "Running stage" not in (process.stdout.readline() or "Running stage"):
            pass
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    section = re.search(
        r"A `dvc exp run` that was killed.*?```\n(.*?)```", (ROOT / "docs/vary.md").read_text(), re.S
    )
    clone.run("bash", "-ec", section[1])
    assert clone.run("git", "symbolic-ref", "HEAD").strip() == "refs/heads/main"
    assert clone.run("git", "diff", "--cached", "--name-only") == ""
    clone.run("git", "checkout", "-q", "--", "params.yaml", "dvc.lock")
    assert clone.run("git", "status", "--porcelain") == ""
    clone.run("dvc", "exp", "run", *OWN, "artifacts")
    assert taken(clone)
