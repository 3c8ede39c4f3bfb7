"""params.yaml: known keys, right types, one line for anything else."""

import copy
from pathlib import Path

import pytest
import yaml

from stages.core.recipe.recipe import load_recipe
from stages.core.runtime.errors import InputError
from stages.core.settings.params import load_params, nearest, parse_params

ROOT = Path(__file__).parents[3]
GIVEN = yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(path, value):
    found = copy.deepcopy(GIVEN)
    *parents, last = path
    place = found
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return found


@pytest.mark.parametrize("profile", GIVEN["profiles"])
def test_every_profile_is_complete(profile):
    params = parse_params(changed(["profile"], profile))
    assert len(params.active.tasks) >= 2


def test_the_default_methods_are_there():
    methods = load_params(ROOT / "params.yaml").methods
    assert list(methods) == [
        "average",
        "git_rebasin",
        "activation_matching",
        "pleas",
        "pleas_adam",
        "progressive",
    ]


def test_a_whole_number_is_a_budget():
    assert parse_params(changed(["budget"], 2)).budget == 2.0


DATA = ["profiles", "digits", "tasks", "upright", "data"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["budget"], "1.46", "budget: found '1.46' (str); allowed: number"),
        (["budget"], float("nan"), "budget: found nan (float); allowed: a finite number"),
        (["budget"], 0.9, "budget: found 0.9; allowed: a number from 1 to 2"),
        (["budget"], 2.01, "budget: found 2.01; allowed: a number from 1 to 2"),
        (["budget"], True, "budget: found True (bool); allowed: number"),
        (["profile"], "digits_splt", "profile: found 'digits_splt'; allowed: digits_split, digits, "),
        (["profile"], "cats", "profile: found 'cats'; allowed: "),
        (["methods"], {}, "methods: found none; allowed: one or more rows"),
        (["profil"], "digits", "profil: unknown key; allowed: profile, profiles_from, source, own"),
        (["source"], "web", "source: found 'web' (str); allowed: 'embedded', 's3' or 'local'"),
        (["seed"], -1, "seed: found -1 (int); allowed: greater than or equal to 0"),
        (["fit"], None, "fit: not there"),
        (["fit", "ridge"], -1.0, "fit.ridge: found -1.0"),
        (["match", "weights", "luck"], 3, "match.weights.luck: unknown key; allowed: by, data, allocate"),
        (["methods", "average", "match"], "luck", "methods.average.match: found 'luck'; allowed: identity"),
        (["methods", "oracle"], {"match": "identity", "fit": {}}, "methods.oracle: this name is taken"),
        (["methods", "pleas_adam", "fit", "norm"], "fold", "methods.pleas_adam.fit: norm: found fold"),
        ([*DATA, "kind"], "cats", "profiles.digits.tasks.upright.data.kind: found 'cats'"),
        ([*DATA, "sise"], 3, "profiles.digits.tasks.upright.data.sise: unknown key; allowed: kind, key"),
        ([*DATA, "mean"], [0.1, 0.2], "profiles.digits.tasks.upright.data: mean needs 1 or 1 numbers"),
        (["profiles", "digits", "tasks", "rotated"], None, "profiles.digits: tasks needs at least two"),
    ],
)
def test_anything_else_is_one_line(path, value, message):
    with pytest.raises(InputError) as error:
        load_recipe(parse_params(changed(path, value)))
    assert str(error.value).startswith(f"params.yaml: {message}")
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not a YAML file"):
        load_params(tmp_path / "params.yaml")


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="method: found 'x'; allowed: average"):
        load_recipe(load_params(ROOT / "params.yaml")).method("x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"match": "activations", "fit": {}, "data": "proxy"}, None),
        (
            {"match": "activations", "fit": {"targets": "own"}, "data": "proxy"},
            "a proxy has no owner",
        ),
        ({"match": "activations", "fit": {}, "data": "proxy", "recalibrate": "tact"}, "which is per task"),
        (
            {"match": "zip", "fit": {"solver": "regmean", "norm": "fold"}},
            "norm: found fold with solver regmean",
        ),
    ],
)
def test_combinations_that_mean_nothing_are_refused(row, message):
    params = parse_params(changed(["methods", "mine"], row))
    if message is None:
        assert load_recipe(params).method("mine").data == "proxy"
    else:
        with pytest.raises(InputError, match=f"methods.mine.*{message}"):
            load_recipe(params)


def test_a_proxy_that_is_not_there_is_named():
    content = changed(["methods", "mine"], {"match": "activations_proxy", "fit": {}})
    del content["profiles"]["digits"]["proxy"]
    with pytest.raises(InputError, match=r"methods\.mine: uses a proxy, which profile digits has not"):
        load_recipe(parse_params(content))


def test_the_full_list_holds_the_short_one():
    methods = load_recipe(load_params(ROOT / "params.yaml"))
    assert methods.full.items() >= methods.methods.items()
    assert {methods.match[m.match].by for m in methods.full.values()} == {
        "identity", "weights", "activations", "dual", "zip", "cca", "transport"
    }  # fmt: skip
    assert {m.recalibrate for m in methods.full.values()} == {"none", "batchnorm", "repair", "tact"}


def test_a_task_may_have_a_head_of_its_own_width():
    profile = parse_params(changed(["profiles", "digits_split", "tasks", "low", "classes"], 7)).profiles[
        "digits_split"
    ]
    assert profile.architecture_of("low").arguments == {**profile.architecture.arguments, "classes": 7}
    assert profile.architecture_of("high") == profile.architecture


def test_published_profiles_are_found_where_the_parameter_says():
    found = yaml.safe_load((ROOT / "params.yaml").read_text())
    found |= {"profile": "cub_pets_rn18"}
    with pytest.raises(InputError, match="profile: found 'cub_pets_rn18'; allowed: digits"):
        parse_params(found)
    published = changed(["profiles_from"], "elsewhere.yaml")
    with pytest.raises(InputError, match=r"profiles_from: found 'elsewhere.yaml'"):
        parse_params(published)


def test_of_many_names_the_nearest_are_said_and_how_many_more():
    assert nearest("b", ["a", "b", "c"]) == "a, b, c"
    names = [f"pair_rn{depth}" for depth in (18, 50, 101)] + [f"other{index}" for index in range(40)]
    said = nearest("pair_rn19", names)
    assert said.startswith("pair_rn18, ")
    assert said.endswith(", and 38 more")
    assert len(said.split(", ")) == 6
