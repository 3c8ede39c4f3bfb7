"""What the earlier stages measured, read and checked, and the result table made of it.

Results are percent for accuracies and "times one source network" for costs. Two shapes recur:

    Probe     {"tasks": {task: {metric: percent}}, "cost": {cost: times}}    one per row, as read from a file
    Metrics   {row: {task: {metric: percent}, ..., "average": {metric: percent, cost: times}}}

A row is a method, ``ensemble`` or ``oracle``. Known metrics are ``accuracy``, ``probe`` (a linear probe on
the features) and ``joint`` (all tasks' classes compete); known costs are ``macs`` and ``parameters``. None of
them has to be there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_json

Probe = dict[str, Any]
Metrics = dict[str, dict[str, dict[str, float]]]

REFERENCES = ("ensemble", "oracle")  # rows that are no merged network
AVERAGE = "average"
REPAIR = "run: dvc repro report"
METRICS = "metrics.json"
TIMINGS = "timings.json"
TABLE = "table.md"

_COSTS = {"macs": "MACs (x)", "parameters": "parameters (x)"}
_MEASURED = {"executed (x)": "executed", "latency (x)": "latency", "seconds": "seconds"}
_ABSENT = "-"


def read_probes(folder: str | Path, rows: Iterable[str], tasks: Iterable[str]) -> dict[str, Probe]:
    """Read ``<folder>/<row>.json`` of every row.

    Format: ``{"tasks": {task: {metric: percent}}, "cost": {name: times}}``; other keys are ignored, metrics
    and costs may be absent or null. Raises InputError when a file is missing or malformed, or when its tasks
    are not exactly ``tasks``.
    """
    tasks = list(tasks)
    if AVERAGE in tasks:
        raise InputError(
            f"params.yaml: found a task named {AVERAGE!r}; allowed: any other name, this one is taken"
        )
    return {row: _probe(Path(folder) / f"{row}.json", tasks) for row in rows}


def read_time(path: str | Path, name: str) -> float | None:
    """Read ``{name: number or null}``. Raises InputError when the file is missing or malformed."""
    return _numbers(Path(path), "", _mapping(Path(path))).get(name)


def read_at_chance(folder: str | Path, tasks: Iterable[str]) -> list[str]:
    """The tasks whose source the probe stage found no better than guessing. Raises InputError as ``read_probes``."""
    path = Path(folder) / "oracle.json"
    found = _mapping(path).get("at_chance") or []
    if not isinstance(found, list) or not set(found) <= set(tasks):
        raise InputError(f"{path}: at_chance: found {found!r}; allowed: tasks of the profile; {REPAIR}")
    return found


def read_hashes(folder: str | Path, rows: Iterable[str]) -> dict[str, str]:
    """File -> sha256 of the networks that were probed, where the probe stage says. Raises InputError."""
    found: dict[str, str] = {}
    for row in rows:
        path = Path(folder) / f"{row}.json"
        own = _mapping(path).get("sha256") or {}
        if not isinstance(own, dict) or not all(isinstance(value, str) for value in own.values()):
            raise InputError(f"{path}: sha256: found {own!r}; allowed: a mapping of hashes; {REPAIR}")
        found |= own
    return found


def read_columns(
    path: str | Path, names: Iterable[str], numbers: Iterable[str], empty: bool = False
) -> pd.DataFrame:
    """Read CSV columns: ``names`` as text, ``numbers`` as float (an empty field is NaN), rows as they come.

    empty: whether no rows are allowed. Raises InputError when the file is missing, lacks a column or rows, or has no
    number where one belongs.
    """
    names, numbers = list(names), list(numbers)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {REPAIR}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file ({error}); {REPAIR}") from error
    absent = [name for name in names + numbers if name not in table]
    if absent:
        raise InputError(f"{path}: found the columns {list(table)}, none called {absent[0]!r}; {REPAIR}")
    if table.empty and not empty:
        raise InputError(f"{path}: found no rows; {REPAIR}")
    for name in numbers:
        try:
            table[name] = pd.to_numeric(table[name].mask(table[name] == "")).astype(float)
        except ValueError as error:
            raise InputError(f"{path}: column {name!r} is not all numbers ({error}); {REPAIR}") from error
        if table[name].abs().max() == math.inf:
            raise InputError(f"{path}: column {name!r}: found inf; allowed: finite numbers; {REPAIR}")
    return table[names + numbers]


def collect_metrics(probes: Mapping[str, Probe]) -> Metrics:
    """Average over the tasks and round: 2 decimals for accuracies, 4 for costs.

    A metric that one of the tasks lacks has no average: the rows of the table stay comparable.
    """
    metrics: Metrics = {}
    for row, probe in probes.items():
        tasks = probe["tasks"]
        everywhere = [
            name for name in next(iter(tasks.values())) if all(name in task for task in tasks.values())
        ]
        average = {name: sum(task[name] for task in tasks.values()) / len(tasks) for name in everywhere}
        metrics[row] = {task: _rounded(values, 2) for task, values in tasks.items()}
        metrics[row][AVERAGE] = _rounded(average, 2) | _rounded(probe["cost"], 4)
    return metrics


def collect_timings(**times: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """{row: {executed, latency, seconds}}, 2 decimals: what differs from run to run; None is left out."""
    found: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        for row, value in values.items():
            if value is not None:
                found.setdefault(row, {})[name] = round(value, 2)
    return found


def average_accuracies(metrics: Metrics) -> dict[str, float]:
    """Average accuracy of every row that has one."""
    return {row: tasks[AVERAGE]["accuracy"] for row, tasks in metrics.items() if "accuracy" in tasks[AVERAGE]}


def best_methods(metrics: Metrics) -> list[str]:
    """The merged methods with the best average accuracy as the table shows it: ties are all best."""
    scores = {r: float(_accuracy(v)) for r, v in average_accuracies(metrics).items() if r not in REFERENCES}
    return [row for row, score in scores.items() if score == max(scores.values())]


WARNING = "**Warning**"


def chance_warning(task: str) -> str:
    """What the reports say of a task whose source is no better than guessing."""
    return (
        f"task {task}: its source network is no better than guessing on its own test images; check data.mean, std, "
        "size, resize, channels and the order of classes against its training"
    )


def markdown(
    metrics: Metrics, timings: Mapping[str, Mapping[str, float]], title: str, at_chance: Sequence[str] = ()
) -> str:
    """The result table as a Markdown page: title, table with the best methods in bold, explanation, warnings."""
    header, rows = cells(metrics, timings, "**{}**", "**{}**")
    table = tabulate(rows, header, "pipe", colalign=_alignment(header), disable_numparse=True)
    lines = [
        "Accuracy in percent; the best average of the merged methods is in bold.",
        "Costs, parameters and latency are relative to one source network; seconds: matching and fit.",
        *(
            [
                "*executed*: multiply-accumulates with the zeros of layers that run at once, where that is faster."
            ]
            if "executed (x)" in header
            else []
        ),
        "*oracle*: each source network on its own task.",
        "*ensemble*: all source networks side by side, logits averaged.",
    ]
    if "joint" in header:
        lines[-1:] = [
            "*ensemble*: all source networks side by side.",
            "*joint*: average accuracy when the classes of all tasks compete.",
        ]
    lines += ["", *(f"{WARNING}: {chance_warning(task)}" for task in at_chance)] if at_chance else []
    return f"# {title}\n\n{table}\n\n" + "\n".join(lines) + "\n"


def terminal(metrics: Metrics, timings: Mapping[str, Mapping[str, float]], title: str) -> str:
    """The result table for a terminal: the best methods carry a star."""
    header, rows = cells(metrics, timings, "{} *", "* {}")
    table = tabulate(rows, header, "simple", colalign=_alignment(header), disable_numparse=True)
    legend = "* best average of the merged methods; accuracy in percent, x: relative to one source network"
    return f"{title}\n\n{table}\n\n{legend}\n"


def cells(
    metrics: Metrics,
    timings: Mapping[str, Mapping[str, float]],
    best_name: str = "{}",
    best_score: str = "{}",
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, the best methods' in the given formats, without columns that have no value."""
    best = best_methods(metrics)
    averages = {row: values[AVERAGE] for row, values in metrics.items()}
    columns = {"method": {row: best_name.format(row) if row in best else row for row in metrics}}
    for task in [name for name in next(iter(metrics.values())) if name != AVERAGE]:
        columns[task] = {row: _accuracy(metrics[row][task].get("accuracy")) for row in metrics}
    for name, metric in (("average", "accuracy"), ("linear probe", "probe"), ("joint", "joint")):
        columns[name] = {row: _accuracy(averages[row].get(metric)) for row in metrics}
    columns["average"] |= {row: best_score.format(columns["average"][row]) for row in best}
    for metric, name in _COSTS.items():
        columns[name] = {row: _times(averages[row].get(metric)) for row in metrics}
    for name, kind in _MEASURED.items():
        columns[name] = {row: _times(timings.get(row, {}).get(kind)) for row in metrics}
    header = [name for name, cells in columns.items() if set(cells.values()) != {_ABSENT}]
    return header, [[columns[name][row] for name in header] for row in metrics]


def _alignment(header: list[str]) -> list[str]:
    return ["left"] + ["right"] * (len(header) - 1)


def _accuracy(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1f}"


def _times(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}"


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _probe(path: Path, tasks: list[str]) -> Probe:
    content = _mapping(path)
    found = content.get("tasks")
    if not isinstance(found, dict) or set(found) != set(tasks):
        what = list(found) if isinstance(found, dict) else found
        raise InputError(f"{path}: tasks: found {what}; allowed: {tasks}, the active profile's; {REPAIR}")
    return {
        "tasks": {task: _numbers(path, f"tasks.{task}", found[task]) for task in tasks},
        "cost": _numbers(path, "cost", content.get("cost") or {}),
    }


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {REPAIR}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}; allowed: a mapping; {REPAIR}")
    return content


def _numbers(path: Path, where: str, found: Any) -> dict[str, float]:
    """The values of a mapping that must be finite numbers; null means absent."""
    if not isinstance(found, dict):
        raise InputError(f"{path}: {where}: found {found!r}; allowed: a mapping of numbers; {REPAIR}")
    for name, value in found.items():
        if not number_or_none(value):
            key = f"{where}.{name}".lstrip(".")
            raise InputError(f"{path}: {key}: found {value!r}; allowed: a finite number; {REPAIR}")
    return {name: float(value) for name, value in found.items() if value is not None}


def number_or_none(value: Any) -> bool:
    """Whether a value is a finite number, or nothing: what was not measured."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
