"""Experiments by the names of what varies, in a small pipeline of their own."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.runtime.errors import InputError
from stages.vary import experiments, main, parse, plain, split

ROOT = Path(__file__).parents[1]


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


def test_a_folder_in_which_the_queue_fails_is_said_before(tmp_path, monkeypatch):
    (tmp_path / "Größe").mkdir()
    monkeypatch.chdir(tmp_path / "Größe")
    with pytest.raises(InputError, match="allowed: ASCII letters"):
        main("seed=0,1")


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{key}_NAME", "test")
        monkeypatch.setenv(f"{key}_EMAIL", "test@localhost")
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "dvc.yaml").write_text("stages:\n  one:\n    cmd: echo\n    params: [seed, budget]\n")
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], ["git", "add", "-A"],
                  ["git", "commit", "-q", "-m", "one"]):  # fmt: skip
        subprocess.run(words, check=True, capture_output=True)
    return tmp_path


def test_experiments_are_in_the_queue_by_their_names(pipeline):
    main("budget=1.0,1.5", "seed=3")
    shown = subprocess.run([sys.executable, "-m", "dvc", "queue", "status"], capture_output=True, text=True)
    assert {"budget-1.0", "budget-1.5"} <= set(shown.stdout.split())
    before = Path(".git/refs/exps/celery/stash").read_text()
    with pytest.raises(InputError, match=r"vary: found budget-1.5, done or queued on this commit"):
        main("budget=1.2,1.5", "seed=3")
    assert Path(".git/refs/exps/celery/stash").read_text() == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("budget=1.0,abc", "vary: budget-abc: params.yaml: budget: found 'abc'"),
        ("budget=choice(1,9)", "params.yaml: budget: found 9; allowed: a number from 1 to 2"),
        ("seed=0,-1", "params.yaml: seed: found -1"),
        ("seed=null", "params.yaml: seed: found None"),
        ("sead=1", "vary: sead-1: Could not override 'sead'"),
        ("+sead=1", "params.yaml: sead: unknown key"),
        ("methods=[nope]", "vary: methods-nope: Error merging"),
        ("methods=${nope}", "'nope' not found"),
        ("fit.ridge=1.0,-1", "params.yaml: fit.ridge: found -1"),
        ("methods.pleas.fit.solver=nope", "params.yaml: methods.pleas.fit.solver: found 'nope'"),
        ("profiles.digits.architecture.arguments.depth=9", "arguments.depth: found 9"),
        ("budget=[1", "vary: budget-1: no viable alternative"),
    ],
)
def test_values_that_a_stage_would_refuse_queue_nothing(word, message, tmp_path, monkeypatch):
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.vary.queue", lambda *queued: pytest.fail(f"queued: {queued}"))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        main(word)
    assert "\n" not in str(error.value)
    assert (tmp_path / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_the_tables_of_the_page_show_what_varies_and_the_averages(pipeline):
    """docs/vary.md, in a pipeline whose metrics have the names of ours."""
    own = {"upright": {"accuracy": 99.123}, "average": {"accuracy": 98.456, "probe": 1.5}}
    Path("given.json").write_text(json.dumps({"progressive": own}))
    text = Path("dvc.yaml").read_text().replace("echo", "cp given.json metrics.json")
    Path("dvc.yaml").write_text(f"{text}    metrics:\n      - metrics.json:\n          cache: false\n")
    for words in (["git", "add", "-A"], ["git", "commit", "-q", "-m", "two"]):
        subprocess.run(words, check=True, capture_output=True)
    dvc("exp", "run", "-n", "large", "-S", "budget=1.46")
    page = (ROOT / "docs/vary.md").read_text()
    (show,) = re.findall(r"^dvc (exp show .*)", page, re.M)
    header, _, *lines = dvc(*shlex.split(show)).strip().splitlines()
    assert sorted(header.replace("|", "").split()) == [
        "Experiment", "budget", "progressive.average.accuracy", "seed"
    ]  # fmt: skip
    assert any("[large]" in line and "98.456" in line and "1.46" in line for line in lines)


def dvc(*words):
    return subprocess.run(
        [sys.executable, "-m", "dvc", *words], check=True, capture_output=True, text=True
    ).stdout
