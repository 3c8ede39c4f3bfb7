"""params.yaml: known keys, right types, one line for anything else."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.recipe.methods import Fit, MatchSettings, Refine
from stages.core.recipe.names import RENAMED
from stages.core.recipe.recipe import load_recipe
from stages.core.recipe.rooms import (
    ALIGNMENTS,
    MATCHINGS,
    RECALIBRATIONS,
    SOLVERS,
    check_fit,
    check_match,
    check_rows,
)
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
        "progressive_refined",
    ]


def test_a_whole_number_is_a_budget():
    assert parse_params(changed(["budget"], 2)).budget == 2.0


def test_a_dense_network_may_cost_the_square():
    dense = changed(["allocate", "layout"], "dense")
    assert parse_params({**dense, "budget": 4}).budget == 4.0
    with pytest.raises(InputError, match=r"budget: found 4.01; allowed: a number from 1 to 4"):
        parse_params({**dense, "budget": 4.01})


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
        (
            ["fit", "ridge"],
            -1.0,
            "fit.ridge: found -1.0 (float); allowed: greater than or equal to 0 or 'auto'",
        ),
        (["fit", "ridge"], "much", "fit.ridge: found 'much' (str); allowed: number or 'auto'"),
        (
            ["match", "weights", "luck"],
            3,
            "match.weights: luck: not a setting of by: weights; allowed: by, sweeps",
        ),
        (
            ["match", "weights", "by"],
            "luck",
            "match.weights.by: found 'luck'; allowed: activations, c2m3, cca, dual",
        ),
        (
            ["full", "tact", "fit", "solver"],
            "luck",
            "full.tact.fit.solver: found 'luck'; allowed: adam, average",
        ),
        (
            ["full", "tact", "recalibrate"],
            "luck",
            "full.tact.recalibrate: found 'luck'; allowed: batchnorm, none",
        ),
        (["methods", "average", "match"], "luck", "methods.average.match: found 'luck'; allowed: identity"),
        (["methods", "oracle"], {"match": "identity", "fit": {}}, "methods.oracle: this name is taken"),
        (
            ["methods", "pleas_adam", "fit", "norm"],
            "fold",
            "methods.pleas_adam.fit: norm: not a setting of solver: adam; allowed: solver, inputs, targets, steps",
        ),
        (
            ["full", "zipit", "fit", "inputs"],
            "source",
            "full.zipit.fit: inputs: not a setting of solver: average",
        ),
        ([*DATA, "kind"], "cats", "profiles.digits.tasks.upright.data.kind: found 'cats'"),
        ([*DATA, "sise"], 3, "profiles.digits.tasks.upright.data.sise: unknown key; allowed: kind, key"),
        ([*DATA, "mean"], [0.1, 0.2], "profiles.digits.tasks.upright.data: mean needs 1 or 1 numbers"),
        ([*DATA, "mean"], [float("nan")], "profiles.digits.tasks.upright.data.mean.0: found nan"),
        ([*DATA, "std"], [1e-300], "profiles.digits.tasks.upright.data.std.0: found 1e-300"),
        (
            ["profiles", "digits", "finetune", "shift"],
            2**31 - 1,
            "profiles.digits.finetune.shift: found 2147483647",
        ),
        (
            ["profiles", "digits_four", "colour"],
            1,
            "profiles.digits_four.colour: unknown key; allowed: architecture",
        ),
        (
            ["fit", "ridge"],
            1e308,
            "fit.ridge: found 1e+308 (float); allowed: less than or equal to 1000000000",
        ),
        (["probe", "penalty"], 1e308, "probe.penalty: found 1e+308"),
        (
            ["probe", "latency_repeats"],
            10**9,
            "probe.latency_repeats: found 1000000000 (int); allowed: less than",
        ),
        (["artifacts", "timeout"], 1e300, "artifacts.timeout: found 1e+300"),
        (
            ["profiles", "digits", "tasks", "average"],
            GIVEN["profiles"]["digits"]["tasks"]["rotated"],
            "profiles.digits: tasks.average: this name is the mean's",
        ),
        (["profiles", "digits", "tasks", "rotated"], None, "profiles.digits: tasks needs at least two"),
    ],
)
def test_anything_else_is_one_line(path, value, message):
    with pytest.raises(InputError) as error:
        check_rows(load_recipe(parse_params(changed(path, value))))
    assert str(error.value).startswith(f"params.yaml: {message}")
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not a YAML file"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("section", ["match", "methods", "full"])
@pytest.mark.parametrize(("former", "name"), RENAMED.items())
def test_a_former_name_of_a_row_or_a_matching_is_refused_with_the_present_one(section, former, name):
    kind = "matching" if section == "match" else "row"
    value = {"by": "identity"} if section == "match" else {"match": "identity", "fit": {}}
    with pytest.raises(InputError) as error:
        load_recipe(parse_params(changed([section, former], value)))
    assert str(error.value) == f"params.yaml: {section}.{former}: this {kind} is now called {name}"


@pytest.mark.parametrize("section", ["methods", "full"])
def test_a_row_that_asks_for_a_matching_by_its_former_name_is_told_the_present_one(section):
    with pytest.raises(InputError, match=rf"{section}\.mine\.match: this matching is now called zipit$"):
        load_recipe(parse_params(changed([section, "mine"], {"match": "zip", "fit": {}})))


def test_a_method_asked_for_by_its_former_name_is_refused_with_the_present_one():
    with pytest.raises(InputError, match=r"^methods\.zip: this row is now called zipit$"):
        load_recipe(load_params(ROOT / "params.yaml")).method("zip")


def test_no_name_in_use_is_a_former_one():
    recipe = load_recipe(load_params(ROOT / "params.yaml"))
    assert not {*recipe.match, *recipe.methods, *recipe.full} & {*RENAMED}
    assert {*RENAMED.values()} <= {*recipe.match, *recipe.full}


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
    ],
)
def test_combinations_that_mean_nothing_are_refused(row, message):
    params = parse_params(changed(["methods", "mine"], row))
    if message is None:
        assert load_recipe(params).method("mine").data == "proxy"
    else:
        with pytest.raises(InputError, match=f"methods.mine.*{message}"):
            check_rows(load_recipe(params))


FIT = {
    "inputs": "merged", "targets": "own", "norm": "fold", "ridge": 0.1, "steps": 3, "learning_rate": 0.1,
    "batch_size": 4, "off_diagonal": 0.5, "refine": Refine(steps=7),
}  # fmt: skip
USED = {
    "average": {"refine"},
    "exact": {"inputs", "targets", "norm", "ridge", "refine"},
    "adam": {"inputs", "targets", "steps", "learning_rate", "batch_size", "refine"},
    "regmean": {"ridge", "off_diagonal", "refine"},
}


@pytest.mark.parametrize("solver", USED)
def test_a_fit_takes_what_its_solver_uses_and_nothing_else(solver):
    assert {"solver", *FIT} == set(Fit.model_fields)
    for key, value in FIT.items():
        if key in USED[solver]:
            found = Fit.model_validate({"solver": solver, key: value})
            check_fit(found)
            assert getattr(found, key) == value
        else:
            with pytest.raises(
                InputError, match=f"{key}: not a setting of solver: {solver}; allowed: solver"
            ):
                check_fit(Fit.model_validate({"solver": solver, key: value}))


def test_a_matching_takes_what_its_way_uses_and_nothing_else():
    with pytest.raises(InputError, match="rho: not a setting of by: identity; allowed: by, data, allocate"):
        check_match(MatchSettings.model_validate({"by": "identity", "rho": 0.5}))


def test_a_proxy_that_is_not_there_is_named():
    content = changed(["methods", "mine"], {"match": "activations_proxy", "fit": {}})
    del content["profiles"]["digits"]["proxy"]
    with pytest.raises(InputError, match=r"methods\.mine: uses a proxy, which profile digits has not"):
        load_recipe(parse_params(content))


def test_the_full_list_holds_the_short_one():
    methods = load_recipe(load_params(ROOT / "params.yaml"))
    assert methods.full.items() >= methods.methods.items()
    used = {methods.match[m.match].by for m in methods.full.values()}
    assert used == {*MATCHINGS.names, *ALIGNMENTS.names}
    assert {m.fit.solver for m in methods.full.values()} == {*SOLVERS.names}
    assert {m.recalibrate for m in methods.full.values()} == {*RECALIBRATIONS.names}


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


def refused(path, value):
    with pytest.raises(InputError) as caught:
        parse_params(changed(path, value))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) <= 300
    return line


def whole_numbers(found, path=()):
    """Paths of all whole numbers of params.yaml that training reads."""
    if isinstance(found, dict):
        return [p for key, value in found.items() for p in whole_numbers(value, (*path, key))]
    return [path] if isinstance(found, int) and not isinstance(found, bool) else []


LATER = ("statistics", "match", "allocate", "fit", "recalibrate", "probe", "methods", "full", "budget")
NUMBERS = [path for path in whole_numbers(GIVEN) if path[0] not in LATER]


@given(st.sampled_from(NUMBERS), st.integers(2**31, 2**70) | st.just(10**5000))
@settings(max_examples=60, deadline=None)
def test_whole_numbers_that_no_kernel_can_index_are_refused(path, value):
    assert str(path[-1]) in refused(list(path), value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("channels", True, "channels: found True (bool); allowed: 1 or 3"),
        ("classes", ["1", "2", "1"], "classes: found 1 twice; allowed: each name once"),
        ("classes", "12", "classes: found '12' (str); allowed: list"),
        ("classes", [1, 2], "classes.0: found 1 (int); allowed: string"),
        ("classes", ["1"], "at least two names"),
        ("classes", [str(i % 40) for i in range(80)], "found 0, 1, 2, 3, ... (40) twice"),
        ("limits", {"pixels": 0}, "limits.pixels: found 0"),
        ("limits", {"unfold": 0.5}, "limits.unfold: found 0.5"),
        ("limits", {"files": 1}, "limits.files: unknown key; allowed: pixels, entries, unfold"),
    ],
)
def test_data_that_cannot_be_meant_are_refused(key, value, message):
    assert message in refused([*DATA, key], value)


@pytest.mark.parametrize("name", ["a", "A-b", "a..b", "a.-b", "1.2.3.4", "xn--abc", "a_b", "-ab", "a" * 64])
def test_a_bucket_name_is_refused_with_the_rule(name):
    line = refused(["artifacts", "bucket"], name)
    assert "artifacts.bucket: found" in line
    assert "allowed: 3 to 63 small letters" in line


def test_named_classes_of_shared_labels_are_the_same_in_the_same_order():
    found = copy.deepcopy(GIVEN)
    for classes, name in ((["3", "5", "7"], "upright"), (["3", "7", "5"], "rotated")):
        found["profiles"]["digits"]["tasks"][name]["data"]["classes"] = classes
    with pytest.raises(
        InputError, match=r"task rotated: data\.classes: found '7' where task upright has '5'"
    ):
        parse_params(found)
    found["profiles"]["digits"]["labels"] = "separate"
    parse_params(found)


@pytest.mark.parametrize(
    "suffix", [".th", ".tar", ".pth.tar", ".ckpt", ".bin", ".pkl", ".pth", ".pt", ".safetensors", ""]
)
@pytest.mark.parametrize("place", ["a/net{}", "./net{}", "s3://bucket/net{}"])
def test_a_checkpoint_has_any_suffix(place, suffix):
    found = copy.deepcopy(GIVEN)
    found["profiles"]["digits"]["tasks"]["upright"]["checkpoint"] = place.format(suffix)
    parse_params(found)


@pytest.mark.parametrize("address", ["", "localhost:9000", "ftp://host", "http://", "http://[::1", "http://host:99999",
                                     "https://host/?a=b", "https://ho st", "https://me:secret@host:9"])  # fmt: skip
def test_endpoints_that_are_none(address):
    line = refused(["artifacts", "endpoint"], address)
    assert "artifacts.endpoint: found" in line
    assert "allowed: null or an address such as https://host:9000" in line
    assert (repr(address) in line) == ("secret" not in address)
    assert "secret" not in line
