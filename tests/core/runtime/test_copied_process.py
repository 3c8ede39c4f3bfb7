import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux alone")

INIT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from stages.core.runtime.copied_process import run_as_copy
from stages.core.runtime.command import _end_without, say
if sys.argv[:1] == ["-m"]:
    run_as_copy("slow", int(os.environ["DVC_PARENT"]), lambda: None, _end_without)
"""
MAIN = """
import os, sys, time
import slow.heavy
if __name__ == "__main__":
    print(os.getpid(), os.getppid(), os.getcwd(), os.environ["DVC_STAGE"], sys.argv[1:], slow.heavy.MADE, flush=True)
    print("read", sys.stdin.readline(), file=sys.stderr)
    if sys.argv[1] == "wait":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("cleaned", flush=True)
            sys.exit(130)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
    sys.exit(int(sys.argv[1]))
"""
HEAVY = "import os\nMADE = os.getpid()\n"


@pytest.fixture
def stage(tmp_path):
    """Starts one, as DVC would, for a DVC that lives until the end of the test."""
    package = tmp_path / "slow"
    package.mkdir()
    for name, text in (("__init__", INIT), ("__main__", MAIN), ("heavy", HEAVY)):
        (package / f"{name}.py").write_text(text)
    dvc = subprocess.Popen(["sleep", "120"])

    def start(word, name="fit@a", **environment):
        variables = {"DVC_PARENT": str(dvc.pid), "DVC_STAGE": name, "PYTHONPATH": str(tmp_path)}
        return subprocess.Popen(
            [sys.executable, "-m", "slow", word],
            cwd=tmp_path,
            env={**os.environ, **variables, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.dvc = dvc
    yield start
    dvc.kill()
    dvc.wait()


def ended(process, word="given\n"):
    out, error = process.communicate(word, timeout=60)
    return process.returncode, out.split(" ", 3), error


def is_there(process):
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    assert true()


def test_stages_of_one_dvc_run_as_copies_of_one_process_with_what_is_their_own(stage, tmp_path):
    status, first, error = ended(stage("3"))
    assert status == 3, error
    assert "read given" in error
    status, second, _ = ended(stage("0", name="fit@b"))
    assert status == 0
    assert first[1] == second[1], "of the same process"
    assert first[0] != second[0] != first[1]
    assert second[2] == str(tmp_path)
    assert second[3].split() == ["fit@b", "['0']", first[1]], "which has imported what they need"
    server = int(first[1])
    assert is_there(server)
    stage.dvc.kill()
    stage.dvc.wait()
    until(lambda: not is_there(server))


def test_a_copy_that_is_killed_is_a_stage_that_is_killed(stage):
    assert ended(stage("killed"))[0] == -signal.SIGKILL
    assert ended(stage("0"))[0] == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_copy_ends_with_its_stage(stage, how):
    process = stage("wait")
    copy = int(process.stdout.readline().split()[0])
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(0.3)
    process.send_signal(how)
    out, error = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in error
    until(lambda: not is_there(copy))
    assert "cleaned" in out
    assert ended(stage("0"))[0] == 0


@pytest.mark.parametrize("change", ["STAGES_ALONE", "WORLD_SIZE", "OTHER"])
def test_a_stage_with_another_environment_runs_by_itself(stage, change):
    _, first, _ = ended(stage("0"))
    process = stage("0", **{change: "1"})
    status, own, error = ended(process)
    assert status == 0, error
    assert int(own[0]) == process.pid, "not a copy"
    assert own[1] != first[1]


def test_code_that_does_not_import_is_said_by_the_stage(stage, tmp_path):
    (tmp_path / "slow" / "heavy.py").write_text("raise ImportError('not here')\n")
    status, _, error = ended(stage("0"))
    assert status == 1
    assert "not here" in error
