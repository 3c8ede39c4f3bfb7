"""How a stage ends: its status, its one line, and that it does not outlive the DVC that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
STAGE = [sys.executable, "-m", "stages.match"]
# What dvc is to a stage: it starts a shell with the command and waits.
DVC = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


def run(body):
    code = f"from stages.core.runtime.command import command\ndef main():\n    {body}\ncommand(main)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.returncode, found.stderr


def test_a_fault_of_the_user_is_one_line_and_status_1():
    code, text = run("from stages.core.runtime.errors import InputError; raise InputError('a: found\\nb')")
    assert (code, text) == (1, "error: a: found b\n")


@pytest.mark.parametrize("fault", ["1 / 0", "raise ValueError('x')", "{}['a']", "raise OSError(28, 'full')"])
def test_a_fault_of_ours_keeps_its_traceback_and_has_another_status(fault):
    code, text = run(fault)
    assert code == 70
    assert text.startswith("Traceback")
    assert "in main" in text


@pytest.mark.parametrize("module", ["stages.fit.common", "stages.vary", "stages.doctor"])
def test_help_is_how_to_call_it_and_what_it_does(module):
    found = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith(f"usage: python -m {module} ")
    assert found.stdout.count("\n") > 2


@pytest.mark.parametrize("module", ["stages.vary", "stages.new"])
def test_help_may_be_read_in_part(module):
    ours, theirs = os.pipe()
    os.close(ours)
    words = [sys.executable, "-m", module, "--help"]
    found = subprocess.run(words, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert found.returncode in (0, 141)  # argparse says nothing where it cannot print
    assert found.stderr == ""


def test_interrupted_is_one_line():
    code, text = run("raise KeyboardInterrupt")
    assert code == 130
    assert text.count("\n") == 1
    assert "interrupted; run the same command again" in text


@pytest.fixture
def slow(tmp_path):
    """An environment in which every stage imports for a minute; the file says when and as which process it began."""
    (tmp_path / "torch").mkdir()
    noted = tmp_path / "importing"
    source = f"import os, time\nopen({str(noted)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    for name in ("torch", "numpy", "pydantic"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "DVC_STAGE"} | {"PYTHONPATH": str(tmp_path)}
    return environment, noted


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def alive(process):
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def begun(noted):
    wait_for(lambda: noted.exists() and noted.read_text())
    return int(noted.read_text())


def test_ctrl_c_while_it_imports_is_one_line(slow):
    environment, noted = slow
    with subprocess.Popen(STAGE, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        os.kill(begun(noted), signal.SIGINT)
        text = process.communicate(timeout=20)[1]
    assert text == "error: stages.match: interrupted; run the same command again\n"
    assert process.returncode == -signal.SIGINT  # 130 in a shell


@pytest.mark.parametrize("shell", [["sh", "-c"], ["bash", "--noprofile", "--norc", "-c"]])
@pytest.mark.parametrize("after", ["", "; true"], ids=["the shell becomes the stage", "the shell waits"])
def test_a_stage_ends_with_the_dvc_that_started_it(slow, shell, after):
    environment, noted = slow
    words = [sys.executable, "-c", DVC, *shell, " ".join(STAGE) + after]
    with subprocess.Popen(words, cwd=ROOT, env={**environment, "DVC_STAGE": "match"}) as dvc:
        stage = begun(noted)
        time.sleep(1.2)
        assert alive(stage)
        dvc.kill()
    wait_for(lambda: not alive(stage), seconds=6)


def test_a_stage_that_hides_from_interrupts_ends_too(slow):
    environment, noted = slow
    hide = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", DVC, sys.executable, "-c", hide, *STAGE]
    with subprocess.Popen(words, cwd=ROOT, env={**environment, "DVC_STAGE": "match"}) as dvc:
        stage = begun(noted)
        dvc.kill()
    wait_for(lambda: not alive(stage), seconds=8)


def test_a_stage_outlives_the_shell_that_started_it_under_nohup(slow):
    environment, noted = slow
    words = [sys.executable, "-c", DVC, "sh", "-c", " ".join(STAGE) + "; true"]
    with subprocess.Popen(words, cwd=ROOT, env=environment) as shell:
        stage = begun(noted)
        shell.kill()
    try:
        time.sleep(1.5)
        assert alive(stage)
    finally:
        os.kill(stage, signal.SIGKILL)
