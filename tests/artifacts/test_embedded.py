import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from stages.artifacts.embedded import enlarge, materialise
from stages.core.networks.checkpoints import load_network
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_tensors
from stages.core.settings.profiles import Profile


def profile(suffix=".safetensors", **changes):
    data = {"kind": "digits", "key": "d/digits.safetensors", "size": 16, "channels": 1, **changes}
    arguments = {"depth": 8, "width": 2, "channels": 1, "classes": 10}
    return Profile.model_validate(
        {
            "architecture": {"name": "resnet", "arguments": arguments},
            "labels": "shared",
            "tasks": {name: {"checkpoint": f"c/{name}{suffix}", "data": data} for name in ("a", "b")},
            "finetune": {"epochs": 1},
        }
    )


def made(root, seed=0, **changes):
    keys = [task.checkpoint for task in profile(**changes).tasks.values()]
    data = next(iter(profile(**changes).tasks.values())).data.key
    materialise(profile(**changes), seed, {key: root / key for key in [data, *keys]})
    return {key: (root / key).read_bytes() for key in [data, *keys]}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_bytes_depend_on_the_seed_and_the_position_only(tmp_path, suffix):
    first = made(tmp_path / "1", suffix=suffix)
    torch.rand(3)
    again = made(tmp_path / "some other place", suffix=suffix)
    other = made(tmp_path / "3", seed=1, suffix=suffix)
    data, a, b = first
    assert first == again
    assert first[data] == other[data]
    assert len({first[a], first[b], other[a], other[b]}) == 4


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_the_checkpoints_load_into_the_architecture(tmp_path, suffix):
    made(tmp_path, suffix=suffix)
    a, b = (load_network(profile().architecture, tmp_path / f"c/{name}{suffix}") for name in "ab")
    assert not torch.equal(a.conv1.weight, b.conv1.weight)


def test_the_suffix_does_not_change_the_network(tmp_path):
    made(tmp_path, suffix=".safetensors")
    made(tmp_path, suffix=".pth")
    a, b = (load_network(profile().architecture, tmp_path / f"c/a{s}") for s in (".safetensors", ".pth"))
    assert torch.equal(a.fc.weight, b.fc.weight)


def test_the_digits_are_those_of_scikit_learn(tmp_path):
    made(tmp_path)
    tensors, _ = read_tensors(tmp_path / "d/digits.safetensors")
    found = load_digits()
    assert tensors["images"].shape == (1797, 16, 16)
    assert tensors["images"].dtype == torch.uint8
    assert tensors["labels"].tolist() == found.target.tolist()
    # At twice the size, each pixel is 3/4 of the nearest and 1/4 of the next nearest, along both directions.
    x = np.pad(found.images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    for axis in (1, 2):
        near, last, following = (np.take(x, np.arange(8) + shift, axis=axis) for shift in (1, 0, 2))
        x = np.stack([near * 3 + last, near * 3 + following], axis + 1) / 4
        x = x.reshape(*x.shape[:axis], 16, *x.shape[axis + 2 :])
    assert np.array_equal(tensors["images"].numpy(), np.round(x * (255 / 16)))


def test_enlarging_keeps_the_range_and_a_flat_image_flat():
    flat = torch.arange(17).double().view(17, 1, 1).expand(17, 8, 8)
    assert torch.equal(enlarge(flat, 16), (flat[:, :1, :1] * 255 / 16).round().byte().expand(17, 16, 16))
    images = torch.randint(17, (5, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(enlarge(images, 8), (images * 255 / 16).round().to(torch.uint8))


def test_materialising_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    made(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_profile_has_nothing_embedded(tmp_path):
    with pytest.raises(InputError, match=r"not embedded; allowed: s3, local"):
        made(tmp_path, kind="folder", key="x.zip")
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"found 'x'; allowed: d/digits.safetensors, c/a.safetensors"):
        materialise(profile(), 0, {"x": tmp_path / "x"})
