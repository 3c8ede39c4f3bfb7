"""The ten lines about this machine: what each check says where something is missing, and how long they take."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stages import doctor
from stages.core.runtime.errors import InputError

ROOT = Path(__file__).parents[1]
NAMES = ["python", "packages", "torch", "gpu", "memory", "disk", "cache", "project", "remote", "bucket"]


@pytest.fixture
def top(tmp_path):
    """A project whose bucket is at an endpoint that is asked for and never answers."""
    for name in ("params.yaml", "published.yaml", "requirements.txt", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    (tmp_path / ".git").mkdir()
    return tmp_path


@pytest.fixture
def silent(top):
    """An endpoint that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        params = yaml.safe_load((top / "params.yaml").read_text())
        params["artifacts"]["endpoint"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (top / "params.yaml").write_text(yaml.safe_dump(params))
        yield params["artifacts"]["endpoint"]


def test_ten_lines_in_seconds_although_the_bucket_is_silent(top, silent):
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "stages.doctor"], cwd=top, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert time.monotonic() - start < 30  # most of it the import of torch
    found = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    assert [name for _, name, _ in found] == NAMES
    assert {state for state, _, _ in found} <= {"ok", "note"}
    assert found[-1][2].startswith(f"{silent}: no answer (nothing within 3 s)")


def test_the_bucket_has_its_own_limit_in_time(top, silent):
    start = time.monotonic()
    assert doctor.bucket(top)[0] == "note"
    assert time.monotonic() - start < 2 * doctor.TIMEOUT


def test_a_missing_package_and_another_version_are_named(top):
    (top / "requirements.txt").write_text("no-such-package==1.0\nnumpy==0.1\n")
    state, found = doctor.packages(top)
    assert (state, found.startswith("missing: no-such-package; ")) == ("wrong", True)
    (top / "requirements.txt").write_text("numpy==0.1\n")
    assert doctor.packages(top)[0] == "note"
    assert "for 0.1" in doctor.packages(top)[1]


def test_a_folder_in_which_the_queue_fails_is_noted(top):
    named = top.rename(top.with_name("Größe"))
    assert doctor.project(named)[0] == "note"
    assert "dvc queue start" in doctor.project(named)[1]


def test_a_clone_on_no_branch_is_told_how_to_go_on(tmp_path):
    for name in (".git/HEAD", ".dvc/config", "dvc.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "params.yaml").write_text((Path(__file__).parents[1] / "params.yaml").read_text())
    for head, state in (("ref: refs/heads/main\n", "ok"), ("0123abc\n", "note")):
        (tmp_path / ".git/HEAD").write_text(head)
        found = doctor.project(tmp_path)
        assert found[0] == state
        assert ("git switch" in found[1]) == (state == "note")


def test_a_folder_that_is_no_clone_is_wrong_and_every_line_is_still_there(tmp_path):
    found = dict(doctor.lines(tmp_path))
    assert list(found) == NAMES
    assert {name for name, (state, _) in found.items() if state == "wrong"} == {
        "packages",
        "project",
        "bucket",
    }
    assert "no .git, .dvc/config, dvc.yaml" in found["project"][1]


def test_a_cache_that_cannot_be_made_is_wrong(top, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    state, found = doctor.cache(top)
    assert state == "wrong"
    assert "set XDG_CACHE_HOME" in found


def test_remotes(top):
    assert doctor.remote(top) == (
        "ok",
        f"local: {(top / '.dvc/remote').resolve()}, made by the first dvc push",
    )
    (top / ".dvc/config.local").write_text("[core]\n    remote = s3\n")
    assert doctor.remote(top)[1].startswith("s3: s3://")
    (top / ".dvc/config.local").write_text("[core]\n    remote = other\n")
    assert doctor.remote(top)[0] == "note"


def test_something_wrong_is_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^doctor: packages, project, bucket: not fit yet"):
        doctor.main()
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES)
