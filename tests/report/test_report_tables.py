import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.runtime.errors import InputError
from stages.report import tables
from stages.report.__main__ import main
from stages.report.show import shown

ROOT = Path(__file__).parents[2]
TWO = {
    "average": (30.0, 40.126),
    "progressive": (98.456, 97.9),
    "ensemble": (64.0, 66.5),
    "oracle": (99.75, 99.8),
}


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is what takes the time; a test that reads only the tables leaves it out."""
    monkeypatch.setattr("stages.report.__main__.pictures", lambda *_: [])


def written(reports: Path) -> dict[str, bytes]:
    texts = [reports / name for name in ("metrics.json", "timings.json", "table.md")]
    return {path.name: path.read_bytes() for path in [*texts, *(reports / "plots").iterdir()]}


@pytest.mark.usefixtures("no_pictures")
def test_metrics_are_exactly_what_was_measured_rounded(make_reports):
    reports = make_reports(accuracies=TWO)
    main()
    assert (reports / "metrics.json").read_text() == (
        json.dumps(
            {
                "average": {
                    "upright": {"accuracy": 30.0, "probe": 33.0},
                    "rotated": {"accuracy": 40.13, "probe": 43.13},
                    "average": {"accuracy": 35.06, "probe": 38.06, "macs": 1.0012, "parameters": 1.0},
                },
                "progressive": {
                    "upright": {"accuracy": 98.46, "probe": 99.9},
                    "rotated": {"accuracy": 97.9, "probe": 99.9},
                    "average": {"accuracy": 98.18, "probe": 99.9, "macs": 1.0012, "parameters": 1.0},
                },
                "ensemble": {
                    "upright": {"accuracy": 64.0, "probe": 67.0},
                    "rotated": {"accuracy": 66.5, "probe": 69.5},
                    "average": {"accuracy": 65.25, "probe": 68.25, "macs": 2.0025, "parameters": 2.0},
                },
                "oracle": {
                    "upright": {"accuracy": 99.75},
                    "rotated": {"accuracy": 99.8},
                    "average": {"accuracy": 99.78, "macs": 1.0012, "parameters": 1.0},
                },
            },
            indent=2,
        )
        + "\n"
    )
    timings = json.loads((reports / "timings.json").read_text())
    merged = {"latency": 1.07, "seconds": 1.75}
    assert timings == {
        "average": merged,
        "progressive": merged,
        "ensemble": {"latency": 2.15},
        "oracle": {"latency": 1.07},
    }


@pytest.mark.usefixtures("no_pictures")
def test_table_has_one_row_per_method_and_the_best_in_bold(make_reports):
    reports = make_reports(accuracies=TWO)
    main()
    lines = (reports / "table.md").read_text().splitlines()
    assert lines[0] == "# Merged networks: digits, budget 1.0, seed 0"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    costs = ["MACs (x)", "parameters (x)", "latency (x)", "seconds"]
    assert cells[0] == ["method", "upright", "rotated", "average", "linear probe", *costs]
    assert cells[2] == ["average", "30.0", "40.1", "35.1", "38.1", "1.00", "1.00", "1.07", "1.75"]
    assert cells[3] == ["**progressive**", "98.5", "97.9", "**98.2**", "99.9", "1.00", "1.00", "1.07", "1.75"]
    assert cells[4] == ["ensemble", "64.0", "66.5", "65.2", "68.2", "2.00", "2.00", "2.15", "-"]
    assert cells[5] == ["oracle", "99.8", "99.8", "99.8", "-", "1.00", "1.00", "1.07", "-"]
    assert len(cells) == 6
    assert "joint" not in "\n".join(lines)


@pytest.mark.usefixtures("no_pictures")
def test_methods_that_look_equal_are_all_best(make_reports):
    make_reports(accuracies=TWO | {"average": (98.15, 98.2)})
    main()
    assert tables.best_methods(json.loads(Path("reports/metrics.json").read_text())) == [
        "average",
        "progressive",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_separate_labels_have_a_joint_column(make_reports):
    reports = make_reports(profile="digits_split")
    main()
    metrics = json.loads((reports / "metrics.json").read_text())
    assert metrics["pleas"]["low"] == {"accuracy": 70.5, "probe": 73.5, "joint": 58.0}
    assert metrics["pleas"]["average"]["joint"] == 53.88
    header, _, *rows = [line for line in (reports / "table.md").read_text().splitlines() if line[:1] == "|"]
    column = header.split("|").index(next(cell for cell in header.split("|") if cell.strip() == "joint"))
    assert [row.split("|")[column].strip() for row in rows][-3:] == ["85.7", "52.8", "-"]


def test_an_average_needs_every_task():
    tasks = {"a": {"accuracy": 50.0, "probe": 60.0}, "b": {"accuracy": 70.0}}
    metrics = tables.collect_metrics({"oracle": {"tasks": tasks, "cost": {}}})
    assert metrics["oracle"]["average"] == {"accuracy": 60.0}


def test_a_second_run_writes_the_same_bytes(make_reports):
    reports = make_reports()
    main()
    first = written(reports)
    main()
    assert written(reports) == first
    pictures = [
        "accuracy.png",
        "accuracy_cost.png",
        "residual.png",
        "ridge.png",
        "separate.png",
        "similarity.png",
    ]
    assert sorted(name for name in first if name.endswith(".png")) == pictures


def test_a_missing_file_is_one_line_on_the_command_line(make_reports):
    (make_reports() / "match/activations.csv").unlink()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.report"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert run.stderr == "error: reports/match/activations.csv: no such file; run: dvc repro report\n"


@pytest.mark.parametrize("name", ["probe/oracle.json", "probe/ensemble.latency.json", "allocate/weights.csv"])
def test_a_missing_file_is_named(make_reports, name):
    (make_reports() / name).unlink()
    with pytest.raises(InputError, match=f"^reports/{name}: no such file; run: dvc repro report$"):
        main()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("probe/pleas.json", "{", "not a JSON file"),
        ("probe/pleas.json", "[]", "found list; allowed: a mapping"),
        (
            "probe/pleas.json",
            '{"tasks": {"upright": {}}}',
            "found ['upright']; allowed: ['upright', 'rotated']",
        ),
        (
            "probe/pleas.json",
            '{"tasks": {"upright": {"accuracy": "9"}, "rotated": {}}}',
            "tasks.upright.accuracy",
        ),
        ("probe/pleas.json", '{"tasks": {"upright": {"accuracy": NaN}, "rotated": {}}}', "found nan"),
        ("probe/pleas.json", '{"tasks": {"upright": 3, "rotated": {}}}', "tasks.upright: found 3"),
        ("probe/pleas.latency.json", '{"latency": true}', "latency: found True"),
        ("fit/pleas.csv", "", "not a CSV file"),
        ("match/weights.csv", "group,network,similarity,unmatched\n", "found no rows"),
        ("fit/pleas.csv", "layer,energy\na,1\n", "none called 'residual'"),
        ("fit/pleas.csv", "layer,residual,ridge\na,much,1\n", "column 'residual' is not all numbers"),
        ("fit/pleas.csv", "layer,residual,ridge\na,inf,1\n", "found inf"),
    ],
)
def test_a_malformed_file_is_named(make_reports, name, content, message):
    (make_reports() / name).write_text(content)
    with pytest.raises(InputError) as error:
        main()
    text = str(error.value)
    assert text.startswith(f"reports/{name}: ")
    assert message in text
    assert text.endswith("; run: dvc repro report")


def test_absent_and_null_metrics_leave_gaps(make_reports):
    reports = make_reports(accuracies=TWO)
    empty = {"tasks": {"upright": {"accuracy": None}, "rotated": {}}, "cost": None}
    for row in TWO:
        (reports / f"probe/{row}.json").write_text(json.dumps(empty))
        (reports / f"probe/{row}.latency.json").write_text('{"latency": null}')
    main()
    assert json.loads((reports / "timings.json").read_text()) == {
        row: {"seconds": 1.75} for row in TWO if row not in ("ensemble", "oracle")
    }
    assert "| method      |" in (reports / "table.md").read_text()


def test_show_prints_the_table_and_the_pictures(make_reports):
    reports = make_reports(accuracies=TWO)
    with pytest.raises(InputError, match="no report here yet"):
        shown(reports)
    main()
    text = shown(Path("reports"))
    assert text.startswith("Merged networks: digits, budget 1.0, seed 0\n")
    assert "progressive *" in text
    assert "* 98.2" in text
    assert "  reports/plots/accuracy.png\n" in text
    text.encode("ascii")
    (reports / "metrics.json").write_text('{"average": 3}')
    with pytest.raises(InputError, match=r"metrics.json is not a report's; run: dvc repro report"):
        shown(reports)


def test_a_source_that_only_guesses_is_a_warning_everywhere(make_reports):
    reports = make_reports(accuracies=TWO)
    main()
    assert "Warning" not in (reports / "table.md").read_text()
    path = reports / "probe/oracle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at_chance": ["rotated"]}))
    main()
    assert (
        (reports / "table.md")
        .read_text()
        .splitlines()[-1]
        .startswith("**Warning**: task rotated: its source")
    )
    assert "\nwarning: task rotated: its source network is no better than guessing" in shown(reports)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at_chance": ["other"]}))
    with pytest.raises(InputError, match=r"oracle.json: at_chance: found \['other'\]"):
        main()


def test_the_stage_starts_without_torch():
    code = "import sys, stages.report.__main__, stages.report.show; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "False\n"
