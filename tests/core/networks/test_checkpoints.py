import argparse
import os
import pathlib
import pickle

import pytest
import torch
from torch import nn

from stages.core.networks.architectures import build
from stages.core.networks.checkpoints import load_into, load_network, read_state
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import write_tensors
from stages.core.settings.profiles import Architecture

ARCHITECTURE = Architecture(name="resnet", arguments={"depth": 8, "width": 2, "channels": 1, "classes": 3})


def network(seed=0):
    torch.manual_seed(seed)
    made = build(ARCHITECTURE.name, ARCHITECTURE.arguments)
    made(torch.rand(4, 1, 8, 8))  # running statistics that are not the initial ones
    return made


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_written_and_read_back_is_the_same_network(tmp_path):
    made = network()
    write_tensors(tmp_path / "a.safetensors", made.state_dict())
    write_tensors(tmp_path / "b.safetensors", made.state_dict())
    read = load_network(ARCHITECTURE, tmp_path / "a.safetensors")
    assert same(read.state_dict(), made.state_dict())
    assert read.state_dict()["bn1.num_batches_tracked"].item() == 1
    assert not any(module.training for module in read.modules())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_loading_leaves_the_random_state_alone(tmp_path):
    write_tensors(tmp_path / "a.safetensors", network().state_dict())
    before = torch.get_rng_state()
    load_network(ARCHITECTURE, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"model": s, "model_ema": {}, "args": argparse.Namespace(lr=0.1, device="cuda")},
        lambda s: {"state_dict": s, "optimizer": {"lr": 0.1}},
        lambda s: {"state_dict": {f"module.{k}": t for k, t in s.items()}},
        lambda s: {"model_ema": {"n_averaged": torch.tensor(5), **{f"module.{k}": t for k, t in s.items()}}},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_every_usual_form_of_a_torch_checkpoint_is_read(tmp_path, wrap, suffix):
    state = network().state_dict()
    path = tmp_path / f"x{suffix}"
    torch.save(wrap(dict(state)), path)
    assert same(load_network(ARCHITECTURE, path).state_dict(), state)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    for zipped in (True, False):
        torch.save({"w": Bomb(tmp_path / "ran")}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"refused.*mkdir.*run code") as caught:
            read_state(tmp_path / "x.pth")
        assert "\n" not in str(caught.value)
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"x\.pth: refused: .*which could run code"):
        read_state(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(_saved(tmp_path, Bomb(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()  # the bomb is live


def _saved(folder, value):
    torch.save(value, folder / "live.pth")
    return folder / "live.pth"


def test_saved_arguments_do_not_let_code_in(tmp_path):
    path = _saved(
        tmp_path, {"model": network().state_dict(), "args": argparse.Namespace(x=Bomb(tmp_path / "ran"))}
    )
    with pytest.raises(InputError, match=r"refused.*mkdir.*run code"):
        read_state(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [nn.Linear(2, 2), pathlib.PurePosixPath("a")])
def test_python_objects_beside_the_tensors_are_refused_by_name(tmp_path, value):
    path = _saved(tmp_path, {"model": dict(network().state_dict()), "args": value})
    with pytest.raises(InputError, match=f"refused.*{type(value).__name__}"):
        read_state(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_line(tmp_path, suffix, share):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(network().state_dict(), path)
    else:
        write_tensors(path, network().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as caught:
        read_state(path)
    assert "x" + suffix in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[1, 2], {}, {"w": 1.0}, {"model": {"w": "text"}}, torch.ones(2)])
def test_what_is_not_a_state_dict_is_one_line(tmp_path, value):
    with pytest.raises(InputError, match="not a state dict"):
        read_state(_saved(tmp_path, value))


def test_missing_files_and_other_suffixes_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_state(tmp_path / "x.pth")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(InputError, match=r"suffix '.bin'; allowed: .safetensors, .pth, .pt"):
        read_state(tmp_path / "x.bin")


def changed(**changes):
    state = dict(network().state_dict())
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(fc__bias=None, fc__weight=None), "x: 2 missing keys (fc.weight, fc.bias)"),
        (changed(a=torch.ones(1)), "x: 1 unexpected key (a)"),
        ({**changed(), **{f"a{i}": torch.ones(1) for i in range(9)}}, "9 unexpected keys (a0, a1, a2, ...)"),
        (changed(fc__weight=torch.ones(4, 8)), "another architecture: fc.weight found 4x8; allowed: 3x8"),
        (
            changed(fc__bias=torch.tensor([0, float("nan"), 0])),
            "NaN or infinite values in 1 tensor (fc.bias)",
        ),
        (changed(bn1__running_var=torch.full((2,), float("inf"))), "bn1.running_var"),
    ],
)
def test_a_state_that_does_not_fit_is_one_line_and_changes_nothing(state, message):
    module = network(1)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_into(module, state, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(before, module.state_dict())


def test_a_checkpoint_without_batch_counters_fits():
    state = {k: t for k, t in network().state_dict().items() if not k.endswith("num_batches_tracked")}
    module = network(1)
    load_into(module, state, "x")
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in state.items())
