"""Every profile of params.yaml is complete: its networks build, its data set is known, its files have a place."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides

from stages.artifacts.settings import outputs
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError
from stages.core.settings.datasets import HOMES
from stages.core.settings.params import load_params, parse_params
from stages.core.settings.places import PATTERN, kind_of

ROOT = Path(__file__).parents[3]


def everything():
    """params.yaml with the published profiles beside its own."""
    found = yaml.safe_load((ROOT / "params.yaml").read_text())
    found["profiles"] |= yaml.safe_load((ROOT / "published.yaml").read_text())["profiles"]
    return found


PARAMS = parse_params(everything())
PAIRS = (
    "clipart_painting",
    "clipart_infograph",
    "clipart_real",
    "painting_infograph",
    "painting_real",
    "infograph_real",
)
FINE = ("cub_pets", "cub_dogs", "pets_nabirds", "nabirds_dogs", "cub_nabirds", "dogs_pets")
NETWORKS = ("rn18", "rn50", "rn101")
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "domainnet": 345}


@pytest.fixture(params=PARAMS.profiles)
def profile(request):
    return PARAMS.profiles[request.param]


def test_its_networks_build_with_a_head_for_every_class(profile):
    for name, task in profile.tasks.items():
        own = profile.architecture_of(name)
        with torch.device("meta"):
            network = build(own.name, own.arguments)
        x = torch.zeros(1, task.data.channels, task.data.size, task.data.size, device="meta")
        logits = network.eval()(x).shape[1]
        if task.data.kind != "folder":
            assert logits == (
                task.data.label_space or len(task.data.classes or []) or CLASSES[task.data.kind]
            )
        if profile.labels == "shared":
            assert own == profile.architecture


def test_its_data_sets_are_known_and_its_files_have_a_place(profile):
    for data in profile.data.values():
        assert data.kind in HOMES
    files = outputs(profile)
    assert len(set(files.values())) == len(files)
    checkpoints = [task.checkpoint for task in profile.tasks.values()]
    assert set(files) == {*checkpoints, *(place for data in profile.data.values() for place in data.places)}
    assert len(set(checkpoints)) == len(checkpoints)
    assert not any("{" in checkpoint for checkpoint in checkpoints)


@pytest.mark.parametrize("name", PARAMS.profiles)
def test_it_can_be_chosen(name):
    found = everything()
    assert parse_params({**found, "profile": name}).active == PARAMS.profiles[name]


def test_every_published_experiment_is_there():
    wanted = [f"domainnet_{pair}_{network}" for pair in PAIRS for network in NETWORKS]
    wanted += [f"{pair}_{network}" for pair in FINE for network in NETWORKS]
    wanted += [f"domainnet_{pair}_rn50_free" for pair in PAIRS] + [f"{pair}_rn50_free" for pair in FINE]
    wanted += [f"{data}_split_x{width}" for data in ("cifar10", "cifar100") for width in (1, 4, 8)]
    wanted += [f"cifar10_{vgg}" for vgg in ("vgg11", "vgg11_bn", "vgg16", "vgg16_bn")]
    own = yaml.safe_load((ROOT / "params.yaml").read_text())["profiles"]
    assert set(wanted) == PARAMS.profiles.keys() - own.keys()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_domains_has_the_keys_of_the_bucket(network, pair):
    profile = PARAMS.profiles[f"domainnet_{pair}_{network}"]
    first, second = pair.split("_")
    assert [task.checkpoint for task in profile.tasks.values()] == [
        f"{network}/domainnet/{first}/v1a/model.pth",
        f"{network}/domainnet/{second}/v1b/model.pth",
    ]
    assert [task.data.domain for task in profile.tasks.values()] == [first, second]
    assert [task.data.key for task in profile.tasks.values()] == [
        f"domainnet/{first}.zip",
        f"domainnet/{second}.zip",
    ]
    assert profile.architecture.name == network.replace("rn", "resnet")
    assert profile.labels == "shared"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pair", FINE)
def test_a_pair_of_fine_grained_data_sets_has_the_keys_of_the_bucket(network, pair):
    profile = PARAMS.profiles[f"{pair}_{network}"]
    folders = {"cub": "cub", "pets": "oxford_pets", "dogs": "stanford_dogs", "nabirds": "nabird"}
    assert [(name, task.data.kind, task.checkpoint) for name, task in profile.tasks.items()] == [
        (name, name, f"{network}/{folders[name]}/{variant}/model.pth")
        for name, variant in zip(pair.split("_"), ("v1a", "v1b"), strict=True)
    ]
    assert profile.labels == "separate"


def test_proxies_are_there_where_no_labels_are_used():
    for name, profile in PARAMS.profiles.items():
        if name.endswith("_free"):
            assert profile.proxy.kind == "imagenet"
            assert profile.tasks == PARAMS.profiles[name.removesuffix("_free")].tasks


def test_the_halves_of_cifar_are_all_of_it():
    for profile, classes in (("cifar10_split", 10), ("cifar10_split_x1", 10), ("cifar100_split_x1", 100)):
        low, high = (task.data.classes for task in PARAMS.profiles[profile].tasks.values())
        assert len(low) == len(high) == classes // 2
        assert len({*low, *high}) == classes
        assert low + high == sorted(low + high)


def test_networks_that_are_trained_here_start_from_initial_weights():
    for name, profile in PARAMS.profiles.items():
        kinds = {kind_of(task.checkpoint) for task in profile.tasks.values()}
        if name.startswith("cifar"):
            assert kinds == {"initial"}
            assert profile.finetune.epochs
        elif not name.startswith("digits"):
            assert kinds == {"key"}
            assert not profile.finetune.epochs


def changed(**changes):
    """params.yaml with one profile changed."""
    found = everything()
    found["profiles"]["cub_pets_rn18"].update(changes)
    return found


def test_the_order_of_the_variants_is_a_setting():
    profile = parse_params(changed(variants=["v1b", "v1a"])).profiles["cub_pets_rn18"]
    assert [task.checkpoint for task in profile.tasks.values()] == [
        "rn18/cub/v1b/model.pth",
        "rn18/oxford_pets/v1a/model.pth",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["v1a"]}, "variants: found ['v1a']; allowed: one for each of cub, pets"),
        ({"variants": "v1a"}, "variants: found v1a"),
        ({"variants": None}, "checkpoint: found 'rn18/cub/{variant}/model.pth'"),
        ({"folder": None}, "checkpoint: found '{folder}/cub/v1a/model.pth'"),
        ({"tasks": None}, "tasks: found None"),
        ({"tasks": {"a": 1, "b": 2}}, "tasks.a: found 1"),
        ({"tasks": {"a": {}, "b": {}}}, "tasks.a.checkpoint: not there"),
    ],
)
def test_what_cannot_be_filled_in_is_one_line(changes, message):
    with pytest.raises(InputError) as caught:
        parse_params(changed(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet50", "timm:create_model", "my_package.nets:small"])
def test_constructors_of_other_packages_have_valid_names(name):
    architecture = {"name": name, "arguments": {"classes": 201}}
    assert (
        parse_params(changed(architecture=architecture)).profiles["cub_pets_rn18"].architecture.name == name
    )


def test_the_pattern_of_places_needs_no_look_ahead():
    """pydantic's regular expressions have none."""
    assert "(?" not in PATTERN


def mappings(value, path):
    """Every mapping inside ``value`` with the way to it."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from mappings(inner, f"{path}.{key}")


def test_no_mapping_is_shared_between_profiles():
    """What YAML shares (`*name`) DVC cannot vary in one place: `-S` would be lost without a word."""
    found = everything()
    first = {}
    for path, mapping in mappings(found, "params"):
        assert first.setdefault(id(mapping), path) == path


SETTINGS = [
    "profiles.digits.finetune.epochs=6",
    "profiles.digits_four.tasks.rotated.data.size=8",
    "profiles.cub_pets_rn50.tasks.cub.data.label_space=200",
    "profiles.domainnet_clipart_real_rn101.variants=[v1b,v1a]",
]


def test_a_setting_of_a_profile_reaches_this_profile_and_no_other(tmp_path):
    """As `dvc exp run -S` sets it."""
    for name in ("params.yaml", "published.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    apply_overrides(tmp_path / "params.yaml", ["profiles_from=published.yaml"])
    before = load_params(tmp_path / "params.yaml").profiles
    assert len(before) == len(PARAMS.profiles)
    apply_overrides(tmp_path / "params.yaml", SETTINGS[:2])
    apply_overrides(tmp_path / "published.yaml", SETTINGS[2:])
    after = load_params(tmp_path / "params.yaml").profiles
    changed = {setting.split(".")[1] for setting in SETTINGS}
    assert {name for name in before if before[name] != after[name]} == changed
    assert after["digits"].finetune.epochs == 6
    assert after["digits_four"].tasks["rotated"].data.size == 8
    assert after["cub_pets_rn50"].tasks["cub"].data.label_space == 200
    real = after["domainnet_clipart_real_rn101"].tasks["real"]
    assert real.checkpoint == "rn101/domainnet/real/v1a/model.pth"
