"""Experiments by the names of what varies, in a small pipeline of their own."""

import subprocess
import sys

import pytest

from stages.core.runtime.errors import InputError
from stages.vary import experiments, main, parse, plain, split


def test_names_say_what_varies_and_nothing_else():
    varied = dict(map(parse, ["budget=1.0,1.46", "profile=digits_split", "seed=0,1"]))
    assert dict(experiments(varied)) == {
        f"budget-{budget}_seed-{seed}": [f"budget={budget}", "profile=digits_split", f"seed={seed}"]
        for budget in ("1.0", "1.46")
        for seed in ("0", "1")
    }


def test_one_experiment_has_a_name_too():
    assert list(experiments({"methods": ["${full}"]})) == [("methods-full", ["methods=${full}"])]


@pytest.mark.parametrize(
    ("text", "values"),
    [("1,2", ["1", "2"]), ("{a: 1, b: [2, 3]},x", ["{a: 1, b: [2, 3]}", "x"]), ("'a,b',c", ["'a,b'", "c"])],
)
def test_values_are_split_at_commas_outside_of_brackets(text, values):
    assert split(text) == values


@pytest.mark.parametrize("text", ["a..b", "/tmp/own", "x.lock", "${full}", "-a-", "a b", "~^:?*["])
def test_names_are_such_as_git_takes(text):
    name = f"key-{plain(text)}".rstrip("-.")
    assert subprocess.run(["git", "check-ref-format", f"refs/exps/{name}"]).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget"], "vary: found 'budget'; allowed: a key"),
        (["budget=1,,2"], "vary: found 'budget=1,,2'"),
        (["seed=0", "seed=1"], "each setting once"),
        (["own=/a/b,/a-b"], "values that give each experiment its own name"),
    ],
)
def test_anything_else_is_one_line(words, message):
    with pytest.raises(InputError, match=message.replace("/", ".")) as error:
        main(*words)
    assert "\n" not in str(error.value)


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{key}_NAME", "test")
        monkeypatch.setenv(f"{key}_EMAIL", "test@localhost")
    (tmp_path / "params.yaml").write_text("seed: 0\nbudget: 1.0\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  one:\n    cmd: echo\n    params: [seed, budget]\n")
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], ["git", "add", "-A"],
                  ["git", "commit", "-q", "-m", "one"]):  # fmt: skip
        subprocess.run(words, check=True, capture_output=True)
    return tmp_path


def test_experiments_are_in_the_queue_by_their_names(pipeline):
    main("budget=1.0,1.5", "seed=3")
    shown = subprocess.run([sys.executable, "-m", "dvc", "queue", "status"], capture_output=True, text=True)
    assert {"budget-1.0", "budget-1.5"} <= set(shown.stdout.split())
    with pytest.raises(InputError, match=r"vary: sead-1: .*sead"):
        main("sead=1")
