"""The report over many experiments: what is read, the table, and the pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from scmrepo.exceptions import SCMError

from stages.core.runtime.errors import InputError
from stages.report import experiments as experiments_module
from stages.report.__main__ import main
from stages.report.comparison import comparisons
from stages.report.experiments import fit_name, markdown, order, read_runs, summary, with_joint

ROWS = ("average", "pleas", "progressive", "zipit", "zipit_progressive")  # of the folders


def test_every_run_and_method_is_a_line(folders):
    runs = read_runs(folders=folders)
    assert len(runs) == 8 * (len(ROWS) + 2)
    one = runs[(runs["profile"] == "digits") & (runs["seed"] == 1) & (runs["budget"] == 1.5)]
    row = one.set_index("method").loc["zipit_progressive"]
    assert (row["accuracy"], row["latency"], row["seconds"]) == (72.0, 1.5, 5.0)
    assert (row["matching"], row["fit"], row["recalibration"]) == (
        "zipit",
        "merged, own, folded",
        "batchnorm",
    )
    assert pd.isna(one.set_index("method").loc["oracle", "matching"])


def test_older_runs_have_the_present_names(folders):
    now = read_runs(folders=folders)
    for folder in folders:
        for file in ("params.yaml", "reports/metrics.json", "reports/timings.json"):
            path = folder / file
            path.write_text(path.read_text().replace("zipit", "zip"))
    pd.testing.assert_frame_equal(read_runs(folders=folders), now)


def test_mean_and_deviation_are_those_of_the_seeds(folders):
    table = summary(read_runs(folders=folders), ["profile", "budget"])
    line = table.loc[("digits", 1.0, "pleas")]
    assert line["mean", "accuracy"] == 56.0
    assert line["std", "accuracy"] == pytest.approx(2**0.5)
    assert line["seeds"].item() == 2


def test_a_run_that_was_made_again_counts_once(folders):
    again = read_runs(folders=[folders[0], *folders])
    assert len(again) == len(read_runs(folders=folders))


@pytest.mark.parametrize(
    ("key", "value", "said", "lost"),
    [
        ("budget", "lots", "budget: found 'lots'", len(ROWS) + 2),
        ("seed", True, "seed: found True", len(ROWS) + 2),
        ("pleas.average.accuracy", "high", "pleas, accuracy: found 'high'", 1),
        ("pleas.average.accuracy", float("nan"), "pleas, accuracy: found nan", 1),
        ("pleas.average.macs", [1], "pleas, macs: found [1]", 1),
    ],
)
def test_what_is_no_number_is_left_out_and_said(folders, monkeypatch, caplog, key, value, said, lost):
    whole, read = read_runs(folders=folders), experiments_module._workspace
    broken = [{**read(folder), **({key: value} if folder == folders[0] else {})} for folder in folders]
    monkeypatch.setattr(experiments_module, "_experiments", lambda commits: broken)
    runs = read_runs()
    assert len(runs) == len(whole) - lost
    assert markdown(runs)
    assert [record.getMessage() for record in caplog.records] == [
        f"experiment {folders[0].name}: {said}, which is no number; left out"
    ]


@pytest.fixture
def project(folders, monkeypatch):
    """A DVC project whose last commit is a run of all rows, and whose workspace is one of another profile."""
    top = folders[0]
    monkeypatch.chdir(top)
    (top / "dvc.yaml").write_text(
        "params: [params.yaml]\nmetrics: [reports/metrics.json, reports/timings.json]\n"
    )
    for words in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "run"],
    ):
        subprocess.run(words, check=True, env=os.environ | AUTHOR)
    return top


AUTHOR = {
    f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}


def change(top, params, keep):
    """Another run in the workspace: other parameters, and only some rows."""
    found = yaml.safe_load((top / "params.yaml").read_text()) | params
    found["methods"] = {name: own for name, own in found["methods"].items() if name in keep}
    (top / "params.yaml").write_text(yaml.safe_dump(found))
    for name in ("metrics", "timings"):
        path = top / f"reports/{name}.json"
        path.write_text(
            json.dumps({row: own for row, own in json.loads(path.read_text()).items() if row in keep})
        )


@pytest.mark.parametrize("params", [{"profile": "digits_split"}, {}])
def test_what_an_experiment_has_not_takes_nothing_from_another(project, params):
    """The workspace is another profile, or the same with fewer methods: dvc fills the rest with the text None."""
    before = read_runs()
    assert set(before["method"]) == {*ROWS, "ensemble", "oracle"}
    change(project, params, keep=("pleas", "oracle"))
    runs = read_runs()
    assert pd.to_numeric(runs["accuracy"]).notna().all()
    committed = runs[runs["profile"] == "digits"]
    assert set(committed["method"]) == set(before["method"])
    others = runs[runs["profile"] == "digits_split"]
    assert set(others["method"]) == ({"pleas", "oracle"} if params else set())
    assert not (runs[["experiment", "method", "matching", "fit"]] == "None").any(axis=None)
    main("--experiments")
    assert "pleas" in Path("reports/experiments/table.md").read_text()


def cells(sections):
    """The rows of the table in each section of markdown."""
    return [
        [[c.strip() for c in line.strip("|").split("|")] for line in section.split("\n") if "|" in line]
        for section in sections
    ]


def test_several_budgets_have_a_table_for_each_accuracy(folders):
    runs = read_runs(folders=folders)
    _, *sections = markdown(runs).split("\n## ")
    assert [section.split("\n")[0] for section in sections] == [
        "digits: accuracy, average over the tasks",
        "digits: linear probes on the features",
        "digits_split: accuracy, average over the tasks",
        "digits_split: joint accuracy, the classes of all heads compete",
        "digits_split: linear probes on the features",
    ]
    header, _, *lines = cells(sections)[3]
    assert header == ["budget", "1", "1.5"]
    assert lines[0] == ["average", "41.0 ± 1.4", "41.0 ± 1.4"]
    assert [line[0] for line in lines] == [*ROWS, "ensemble", "oracle"]
    assert "## " not in markdown(runs[runs["budget"] == 1.0])


def test_the_joint_accuracy_is_drawn_as_a_profile_of_its_own(folders):
    found = with_joint(read_runs(folders=folders))
    assert list(dict.fromkeys(found["profile"])) == ["digits", "digits_split", "digits_split, joint"]
    joint = found[found["profile"] == "digits_split, joint"]
    assert (joint["accuracy"] == joint["joint"]).all()


def test_the_table_has_a_column_for_each_profile(folders):
    runs = read_runs(folders=folders)
    lines = cells(markdown(runs).split("\n## "))[0]
    costs = ["MACs (x)", "latency (x)", "seconds"]
    assert lines[0] == ["method", "digits", "digits_split", "digits_split, joint", *costs]
    assert lines[2] == ["average", "51.0 ± 1.4", "51.0 ± 1.4", "41.0 ± 1.4", "1.00", "1.00", "1.00"]
    assert [line[0] for line in lines[2:]] == [*ROWS, "ensemble", "oracle"]
    assert order(runs)[-2:] == ["ensemble", "oracle"]


def test_the_pictures_are_drawn(folders):
    runs = read_runs(folders=folders)
    found = dict(comparisons(runs))
    assert set(found) == {"method_comparison.png", "accuracy_vs_budget.png", "ablation.png"}
    assert all(content[:4] == b"\x89PNG" for content in found.values())
    assert dict(comparisons(runs)) == found
    one = dict(comparisons(runs[(runs["budget"] == 1.0) & (runs["method"] == "pleas")]))
    assert set(one) == {"method_comparison.png"}


def test_the_command_writes_everything(folders):
    main("--experiments", *map(str, folders))
    written = {path.name for path in Path("reports/experiments").iterdir()}
    assert written == {
        "index.html",
        "runs.csv",
        "table.md",
        "method_comparison.png",
        "accuracy_vs_budget.png",
        "ablation.png",
    }


@pytest.mark.parametrize(
    "words", [("--all",), *(("--experiments", *own.split()) for own in ("nowhere", "1 2x", "4 5", "0"))]
)
def test_other_words_are_refused(words, folders):
    with pytest.raises(InputError, match=r"^report: found .*; allowed: nothing, or --experiments") as error:
        main(*words)
    assert words == ("--all",) or f"found {', '.join(words[1:])}, no folder" in str(error.value)


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), SCMError("Empty git repo")])
def test_a_folder_in_which_dvc_fails_is_one_line(project, monkeypatch, fault):
    def fails(**_):
        raise fault

    monkeypatch.setattr("dvc.api.exp_show", fails)
    with pytest.raises(InputError, match=r"^experiments: dvc cannot list them \(.*; allowed: a DVC project"):
        main("--experiments")


def test_experiments_are_listed_from_the_top_folder_alone(project, monkeypatch):
    (project / "below").mkdir()
    monkeypatch.chdir(project / "below")
    with pytest.raises(InputError, match=r"params\.yaml: no such file; run from the top folder"):
        main("--experiments")
    assert not any(Path().iterdir())


@pytest.mark.parametrize(
    ("fit", "name"),
    [
        ({"solver": "average"}, "average"),
        ({"solver": "exact"}, "source, ensemble"),
        ({"solver": "adam", "inputs": "source", "targets": "ensemble"}, "source, ensemble, adam"),
        ({"solver": "exact", "inputs": "merged", "targets": "own", "norm": "fold"}, "merged, own, folded"),
        ({}, None),
    ],
)
def test_a_fit_has_a_short_name(fit, name):
    assert fit_name({key: fit.get(key) for key in ("solver", "inputs", "targets", "norm")}) == name
