import argparse
import os
import pickle
import random
import time
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def prefixed(state, prefix):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


WRAPS = {
    "bare": lambda s: s,
    **{
        key: lambda s, key=key: {"epoch": 3, key: s}
        for key in ("model", "net", "state_dict", "model_state_dict")
    },
    **{key: lambda s, key=key: {key: s, "epoch": 3} for key in ("model_ema", "ema", "params", "weights")},
    "paths": lambda s: {
        "model": s,
        "args": argparse.Namespace(folder=Path("runs/1")),
        "at": PurePosixPath("b"),
    },
    "arguments": lambda s: {"model": s, "model_ema": {}, "args": argparse.Namespace(lr=0.1, device="cuda")},
    "a name of the model beside it": lambda s: {"model": "resnet20", "state_dict": s},
    "average": lambda s: {"model_ema": {"n_averaged": torch.tensor(5), **prefixed(s, "module.")}},
    "twice": lambda s: {"ema": {"state_dict": s, "decay": 0.99}},
    "scores and optimiser": lambda s: {
        "optimizer": torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1, momentum=0.9).state_dict(),
        "best_prec1": np.float64(91.7),
        "history": np.arange(5),
        "rng": np.random.get_state(),
        "state_dict": s,
    },
    "values among the tensors": lambda s: {**s, "epoch": 3, "best": np.float32(1.0)},
    **{
        prefix: lambda s, prefix=prefix: {"state_dict": prefixed(s, prefix)}
        for prefix in (
            "module.",
            "model.",
            "net.",
            "backbone.",
            "_orig_mod.",
            "module._orig_mod.",
            "model.module.",
        )
    },
}
SUFFIXES = (".pth", ".pt", ".th", ".tar", ".pth.tar", ".ckpt", ".bin", ".pkl", ".safetensors", "")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", WRAPS)
def test_every_usual_form_of_a_torch_checkpoint_is_read(tmp_path, wrap, zipped):
    state = network().state_dict()
    path = tmp_path / "x.th"
    torch.save(WRAPS[wrap](dict(state)), path, _use_new_zipfile_serialization=zipped)
    assert same(load_network(ARCHITECTURE, path).state_dict(), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_file_is_is_read_from_its_bytes(tmp_path, suffix):
    state = network().state_dict()
    torch.save({"state_dict": state}, tmp_path / f"torch{suffix}")
    write_tensors(tmp_path / f"safe{suffix}", network().state_dict())
    for name in ("torch", "safe"):
        assert same(load_network(ARCHITECTURE, tmp_path / f"{name}{suffix}").state_dict(), state)


def test_an_option_a_resnet_20_as_published_is_read(tmp_path):
    """As akamaster's pytorch_resnet_cifar10 writes it: a state_dict under `module.`, and the best score."""
    shapes = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    norms = {"bn1": 16}
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            for layer in (1, 2):
                c_in = width // 2 if stage > 1 and block == 0 and layer == 1 else width
                shapes[f"layer{stage}.{block}.conv{layer}.weight"] = (width, c_in, 3, 3)
                norms[f"layer{stage}.{block}.bn{layer}"] = width
    for name, width in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    path = tmp_path / "resnet20-12fca82f.th"
    torch.save({"state_dict": prefixed(state, "module."), "best_prec1": np.float64(91.73)}, path)
    module = nn.Module()
    for name, shape in shapes.items():
        place = module
        *folders, last = name.split(".")
        for folder in folders:
            if not hasattr(place, folder):
                place.add_module(folder, nn.Module())
            place = getattr(place, folder)
        place.register_buffer(last, torch.zeros(shape))
    load_into(module, read_state(path), str(path))
    assert same(dict(module.state_dict()), state)


class Wrapped(nn.Module):
    """A network whose own names begin as a wrapper's do."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_only_prefixes_that_the_network_has_not_are_taken_off(prefix):
    state = {key: torch.rand_like(t) for key, t in Wrapped().state_dict().items()}
    module = Wrapped()
    if prefix.endswith("model."):
        state = {key.removeprefix("model."): t for key, t in state.items()}
        module = module.model
    load_into(module, prefixed(state, prefix), "x")
    assert same(dict(module.state_dict()), state)


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


def test_python_objects_beside_the_tensors_are_refused_by_name(tmp_path):
    path = _saved(tmp_path, {"model": dict(network().state_dict()), "args": nn.Linear(2, 2)})
    with pytest.raises(InputError, match=r"refused.*Linear"):
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint but empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (
            b"profile: digits  # a key\nseed: 0\n" * 9,
            "not a checkpoint but a text; allowed: a file as torch.save",
        ),
        (b"GGUF" * 100, "damaged or not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, content, message):
    with pytest.raises(InputError, match="no such file"):
        read_state(tmp_path / "x.pth")
    with pytest.raises(InputError, match="found a folder; allowed: a checkpoint"):
        read_state(tmp_path)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_state(tmp_path / "x.pth")


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
        (
            changed(fc__bias=None, fc__weight=None),
            "2 missing and 0 unexpected keys; the network has fc.weight, fc.bias, the file conv1.weight, bn1.weight",
        ),
        (
            changed(a=torch.ones(1)),
            "0 missing and 1 unexpected keys; the network has conv1.weight, bn1.weight, ... (",
        ),
        ({**changed(), **{f"a{i}": torch.ones(1) for i in range(9)}}, "0 missing and 9 unexpected keys"),
        (changed(fc__weight=torch.ones(4, 8)), "another architecture: fc.weight found 4x8; allowed: 3x8"),
        (
            changed(fc__bias=torch.tensor([0, float("nan"), 0])),
            "x: fc.bias: NaN or infinite values",
        ),
        (changed(bn1__running_var=torch.full((2,), float("inf"))), "bn1.running_var"),
        (changed(bn1__running_var=torch.tensor([1.0, -0.1])), "bn1.running_var: negative values"),
        (changed(fc__bias=torch.ones(3, dtype=torch.complex64)), "fc.bias: found torch.complex64"),
        (changed(fc__bias=torch.ones(3, dtype=torch.bool)), "fc.bias: found torch.bool"),
        (changed(fc__bias=torch.ones(3, dtype=torch.int8)), "fc.bias: found torch.int8"),
        (
            changed(fc__bias=torch.ones(3, dtype=torch.int32)),
            "fc.bias: found torch.int32; allowed: torch.float32",
        ),
        (changed(bn1__num_batches_tracked=torch.tensor(1.0)), "found torch.float32; allowed: torch.int64"),
        (changed(bn1__num_batches_tracked=torch.tensor(True)), "found torch.bool; allowed: torch.int64"),
        (
            changed(fc__bias=torch.tensor([0, 1e300, 0], dtype=torch.float64)),
            "float64 that torch.float32 cannot hold",
        ),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_those_of_the_network(dtype):
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in network().state_dict().items()}
    module = network(1)
    load_into(module, state, "x")
    assert same(dict(module.state_dict()), {k: t.to(module.state_dict()[k].dtype) for k, t in state.items()})


# --- damage, and what is no plain tensor


def outcome(path):
    """The tensors, or None where one line refuses them."""
    try:
        return load_network(ARCHITECTURE, path).state_dict()
    except InputError:
        return None


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_never_gives_other_weights(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "x.pth"
    state = network().state_dict()
    torch.save({"state_dict": state}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found = outcome(path)
    assert found is None or same(found, state)


def test_many_flips_are_nearly_all_told(tmp_path):
    """Else the test above could pass by reading nothing but padding."""
    state, draw = network().state_dict(), random.Random(0)
    torch.save(state, tmp_path / "x.pth")
    whole, told = (tmp_path / "x.pth").read_bytes(), 0
    inside = [i for t in state.values() for i in [whole.find(t.numpy().tobytes())] if t.numel() > 8 and i > 0]
    assert len(inside) > 5
    for start in inside:
        content = bytearray(whole)
        content[start + draw.randrange(32)] ^= 1 << draw.randrange(8)
        (tmp_path / "x.pth").write_bytes(content)
        told += outcome(tmp_path / "x.pth") is None
    assert told == len(inside)


class Subclass(torch.Tensor):
    pass


def odd_tensors():
    plain = torch.ones(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
            "float8": plain.to(torch.float8_e4m3fn),
            "sparse": plain.to_sparse(),
            "compressed": plain.to_sparse_csr(),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "meta": torch.ones(2, 3, device="meta"),
            "subclass": plain.as_subclass(Subclass),
            "complex": plain.to(torch.complex64),
        }


@pytest.mark.parametrize("kind", sorted(odd_tensors()))
def test_what_no_layer_holds_is_one_line(tmp_path, kind):
    path = _saved(tmp_path, {"state_dict": {**network().state_dict(), "fc.bias": odd_tensors()[kind]}})
    with pytest.raises(InputError) as caught:
        read_state(path)
    line = str(caught.value)
    assert len(line) <= 300
    assert "fc.bias: found" in line or "refused" in line, line


@pytest.mark.parametrize("key", [0, 1.5, ("a", "b"), None])
def test_names_that_are_no_text_are_one_line(tmp_path, key):
    with pytest.raises(InputError, match="found a tensor by the name"):
        read_state(_saved(tmp_path, {key: torch.ones(2)}))


# --- costs out of proportion


def rewritten(path, change):
    """The zip file at ``path`` with its entries changed: (name, content) -> (name, content, compression)."""
    with zipfile.ZipFile(path) as file:
        entries = [(info.filename, file.read(info)) for info in file.infolist()]
    with zipfile.ZipFile(path, "w") as file:
        for entry in entries:
            name, content, compression = change(*entry)
            file.writestr(name, content, compression)
    return path


def test_deflated_storages_are_refused_before_they_unfold(tmp_path):
    path = _saved(tmp_path, {"w": torch.zeros(1000)})
    zeros = bytes(64 << 20)
    rewritten(path, lambda name, content: (
        name, zeros if name.endswith("/data/0") else content, zipfile.ZIP_DEFLATED
    ))  # fmt: skip
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match="found compressed entries"):
        read_state(path)


def test_views_larger_than_their_storage_cost_nothing(tmp_path):
    state = {**network().state_dict(), "fc.weight": torch.ones(1).expand(1 << 20, 1 << 20)}
    path = _saved(tmp_path, state)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"fc\.weight found 1048576x1048576"):
        load_into(network(), read_state(path), "x")
    assert time.monotonic() - start < 5


def test_thousands_of_tiny_tensors_are_one_line_in_seconds(tmp_path):
    path = _saved(tmp_path, {f"w{i}": torch.ones(1) for i in range(5000)})
    start = time.monotonic()
    with pytest.raises(InputError, match="5000 unexpected"):
        load_network(ARCHITECTURE, path)
    assert time.monotonic() - start < 10


def test_a_header_out_of_proportion_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((40 << 20).to_bytes(8, "little") + b"{")
        file.truncate(48 << 20)
    with pytest.raises(InputError, match="found a header of 41943040 bytes; allowed: up to 33554432"):
        read_state(path)


def test_a_torchscript_file_is_told_by_name(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        read_state(tmp_path / "x.pt")


def test_numpy_is_never_called(tmp_path, monkeypatch):
    path = _saved(tmp_path, {"state_dict": network().state_dict(), "a": np.arange(3), "b": np.float64(2.0)})
    monkeypatch.setattr(np._core.multiarray, "scalar", lambda *_: pytest.fail("called"))
    assert read_state(path).keys() == network().state_dict().keys()
