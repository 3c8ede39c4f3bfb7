import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from stages.artifacts.embedded import materialise
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors, write_tensors
from stages.core.settings.params import load_params
from stages.finetune import workers
from stages.finetune.workers import Job

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sessions and signals of POSIX")


@pytest.fixture
def workspace(tmp_path):
    """A folder with params.yaml and the artifacts of a tiny pair."""
    return prepared(tmp_path)


def prepared(folder, workers=2, **finetune):
    found = yaml.safe_load((PROJECT / "params.yaml").read_text())
    data = {"kind": "digits", "key": "digits.safetensors", "size": 8, "channels": 1}
    found["profiles"] = {
        "digits": {
            "architecture": {
                "name": "resnet",
                "arguments": {"depth": 8, "width": 2, "channels": 1, "classes": 10},
            },
            "labels": "shared",
            "tasks": {
                "a": {"checkpoint": "a.safetensors", "data": data},
                "b": {"checkpoint": "b.safetensors", "data": {**data, "view": "inverted"}},
            },
            "finetune": {"epochs": 1, "batch_size": 64, **finetune},
        }
    }
    found.update(profile="digits", device="cpu", finetune={"workers": workers})
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
    checkpoints, images = folder / "models/artifacts", folder / "data/artifacts"
    files = {"digits.safetensors": images / "digits.safetensors"}
    files.update({f"{name}.safetensors": checkpoints / f"{name}.safetensors" for name in "ab"})
    materialise(load_params(folder / "params.yaml").active, 0, files)
    return folder


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with open(folder / "stderr", "w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.finetune"],
            cwd=folder,
            env=environment,
            stderr=errors,
            start_new_session=True,
        )


def run(folder):
    status = start(folder).wait(timeout=120)
    return status, (folder / "stderr").read_text()


def outputs(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for top in ("models/finetune", "reports/finetune")
        for path in sorted((folder / top).rglob("*"))
    }


def test_a_second_run_gives_the_same_bytes_with_another_number_of_workers(workspace):
    assert run(workspace)[0] == 0
    first = outputs(workspace)
    assert list(first) == [
        "models/finetune/a.json",
        "models/finetune/a.safetensors",
        "models/finetune/b.json",
        "models/finetune/b.safetensors",
        "reports/finetune/a.csv",
        "reports/finetune/b.csv",
    ]
    prepared(workspace, workers=1)
    assert run(workspace)[0] == 0
    assert outputs(workspace) == first
    assert (
        first["reports/finetune/a.csv"]
        .decode()
        .startswith("epoch,learning_rate,train_loss,train_accuracy\n1,")
    )
    assert first["models/finetune/a.safetensors"] != first["models/finetune/b.safetensors"]


def test_no_epochs_pass_the_checkpoint_through(tmp_path):
    folder = prepared(tmp_path, epochs=0)
    assert run(folder)[0] == 0
    for name in "ab":
        before, _ = read_tensors(folder / f"models/artifacts/{name}.safetensors")
        after, _ = read_tensors(folder / f"models/finetune/{name}.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        text = (folder / f"reports/finetune/{name}.csv").read_text()
        assert text == "epoch,learning_rate,train_loss,train_accuracy\n"


def test_no_epochs_pass_through_whatever_wraps_the_weights_and_any_head(tmp_path):
    """A checkpoint as a training script on several GPUs leaves it, with a head of its own width."""
    folder = prepared(tmp_path, epochs=0)
    found = yaml.safe_load((folder / "params.yaml").read_text())
    profile = found["profiles"]["digits"]
    profile["labels"] = "separate"
    profile["tasks"]["a"] |= {"checkpoint": "resnet8/a/v1a/model.pth", "classes": 7}
    profile["tasks"]["a"]["data"]["classes"] = list("0123456")
    (folder / "params.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
    state = build("resnet", {"depth": 8, "width": 2, "channels": 1, "classes": 7}).state_dict()
    path = folder / "models/artifacts/resnet8/a/v1a/model.pth"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, path)
    status, errors = run(folder)
    assert status == 0, errors
    after, _ = read_tensors(folder / "models/finetune/a.safetensors")
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) and after[key].dtype == state[key].dtype for key in state)


def test_an_error_in_a_worker_is_one_line(workspace):
    path = workspace / "models/artifacts/b.safetensors"
    tensors, _ = read_tensors(path)
    write_tensors(path, {**tensors, "fc.bias": torch.full((10,), float("nan"))})
    status, errors = run(workspace)
    lines = [line for line in errors.splitlines() if line.startswith("error")]
    assert status == 1
    assert len(lines) == 1
    assert "Traceback" not in errors
    assert "models/artifacts/b.safetensors: fc.bias: NaN or infinite values" in lines[0]


def test_an_error_of_training_names_the_task(tmp_path):
    folder = prepared(tmp_path)
    active = load_params(folder / "params.yaml").active
    job = Job(
        name="b",
        architecture=active.architecture,
        task=active.tasks["b"],
        settings=active.finetune.model_copy(update={"learning_rate": 1e30}),
        seeds=(0,),
        artifacts=(folder / "data/artifacts", folder / "models/artifacts"),
        device="cpu",
        mixed_precision=False,
    )
    with pytest.raises(InputError, match="task b: training diverged in epoch 1"):
        workers.run(job)


def alive(process):
    """Ids of the processes in the group that ``process`` leads, without those already ended."""
    command = ["ps", "-o", "pid=,stat=", "-s", str(process.pid)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if not line.split()[1].startswith("Z")]


def busy(process):
    """Processor seconds of the third busiest process in the group: a worker, if there are two."""
    command = ["ps", "-o", "cputimes=", "-s", str(process.pid)]
    times = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return sorted(map(int, times))[-3] if len(times) >= 3 else 0


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def training(folder):
    """Start an endless training and wait until its workers are at it."""
    process = start(prepared(folder, epochs=100_000))
    try:
        wait_for(lambda: len(alive(process)) >= 3, 60)
        wait_for(lambda: busy(process) >= 1, 180)
    except AssertionError:
        for pid in alive(process):
            os.kill(pid, signal.SIGKILL)
        raise
    return process


def test_ctrl_c_ends_the_workers_and_leaves_nothing_half_written(tmp_path):
    process = training(tmp_path)
    for pid in alive(process):  # a terminal sends it to all
        os.kill(pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    wait_for(lambda: not alive(process), 10)
    errors = (tmp_path / "stderr").read_text()
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert outputs(tmp_path) == {}


def test_the_workers_end_with_a_parent_that_is_killed(tmp_path):
    process = training(tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(process), 10)
