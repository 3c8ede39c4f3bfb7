"""Every finished experiment in one table, with mean and spread over seeds, and pictures of it.

python -m stages.report --experiments      ->  reports/experiments/{runs.csv, table.md, *.png}
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from stages.core.recipe.names import present
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_json
from stages.core.settings.params import load_params
from stages.report.tables import AVERAGE, METRICS, REFERENCES, TIMINGS, number_or_none

log = logging.getLogger(__name__)

LEFT_OUT = "experiment %s: %s: found %.40r, which is no number; left out"
MEASURES = ("accuracy", "joint", "probe", "macs", "parameters", "latency", "seconds")
RUN = ("profile", "budget", "seed")
ABSENT = (None, "None", "", "-", "!")  # of dvc: the text for nothing, and for a file that could not be read
ACCURACIES = {
    "accuracy": "accuracy, average over the tasks",
    "joint": "joint accuracy, the classes of all heads compete",
    "probe": "linear probes on the features",
}


def read_runs(commits: int = 1, folders: Sequence[Path] = ()) -> pd.DataFrame:
    """One line per experiment and method: what was set, and the averages over tasks.

    commits: how many commits back experiments are looked for. folders: other workspaces (params.yaml and reports/) to
    read instead. Former names of rows and matchings become the present ones. Of runs with the same profile, budget
    and seed the last one to have a method counts. Raises InputError when there is none with results.
    """
    found = [_workspace(folder) for folder in folders] if folders else _experiments(commits)
    rows = [row for experiment in found for row in _rows(experiment)]
    if not rows:
        raise InputError("experiments: found none with results; run: dvc exp run, or dvc queue start")
    runs = pd.DataFrame(rows).drop_duplicates([*RUN, "method"], keep="last")
    return runs.sort_values([*RUN], kind="stable").reset_index(drop=True)


def _experiments(commits: int) -> list[Mapping[str, Any]]:
    """The experiments of the last commits as dvc shows them, the latest last."""
    from dvc.api import exp_show  # here: slow to import
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    try:
        return [_present(experiment) for experiment in reversed(exp_show(num=commits))]
    except (DvcException, SCMError, OSError) as error:
        raise InputError(
            f"experiments: dvc cannot list them ({error}); allowed: a DVC project with git, that can be written"
        ) from error


def _present(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Without what dvc fills in for a value that this experiment has not and another one has."""
    return {key: value for key, value in experiment.items() if value not in ABSENT}


def _workspace(folder: Path) -> dict[str, Any]:
    """The same of one folder."""
    params = load_params(folder / "params.yaml").model_dump()
    reports = [read_json(folder / "reports" / name) for name in (METRICS, TIMINGS)]
    flat = {key: value for content in (params, *reports) for key, value in _flat(content)}
    return {"Experiment": folder.name, **flat}


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _rows(experiment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    ending, run = f".{AVERAGE}.accuracy", experiment.get("Experiment") or experiment.get("rev")
    results = [key for key, value in experiment.items() if key.endswith(ending) and value is not None]
    for key in ("budget", "seed") if results else ():
        if not number_or_none(experiment.get(key)):
            log.warning(LEFT_OUT, run, key, experiment[key])
            return
    for key in results:
        method = key.removesuffix(ending)
        row = {"experiment": run, "method": present(method)}
        row |= {name: experiment.get(name) for name in RUN}
        row["images"] = experiment.get("fit.images")
        for name in MEASURES:
            column = method if name in ("latency", "seconds") else f"{method}.{AVERAGE}"
            row[name] = experiment.get(f"{column}.{name}")
        matching = experiment.get(f"methods.{method}.match")
        row["matching"] = matching and present(matching)
        row["fit"] = fit_name(
            {
                key: experiment.get(f"methods.{method}.fit.{key}")
                for key in ("solver", "inputs", "targets", "norm")
            }
        )
        recalibrated = experiment.get(f"methods.{method}.recalibrate")
        row["recalibration"] = None if row["fit"] is None else recalibrated or "batchnorm"
        if None in [row[name] for name in RUN]:
            continue
        if wrong := [name for name in MEASURES if not number_or_none(row[name])]:
            log.warning(LEFT_OUT, run, f"{method}, {wrong[0]}", row[wrong[0]])
            continue
        yield row


def fit_name(fit: Mapping[str, Any]) -> str | None:
    """A short name: average, regmean, or inputs and targets of the least squares. None where there is no fit."""
    if fit["solver"] in (None, "average", "regmean"):
        return fit["solver"]
    words = [fit["inputs"] or "source", fit["targets"] or "ensemble"]
    return ", ".join(
        [
            *words,
            *(["folded"] if fit["norm"] == "fold" else []),
            *(["adam"] if fit["solver"] == "adam" else []),
        ]
    )


def summary(runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of every metric, for each combination of ``keys``."""
    metrics = [name for name in MEASURES if name in runs]
    numbers = runs.assign(**{name: pd.to_numeric(runs[name]) for name in metrics})
    grouped = numbers.groupby([*keys, "method"], sort=False)
    table = pd.concat({"mean": grouped[metrics].mean(), "std": grouped[metrics].std()}, axis=1)
    table["seeds", ""] = grouped["seed"].nunique()
    return table


def markdown(runs: pd.DataFrame) -> str:
    """The table of all methods, one column of accuracies for each profile, at the smallest budget that was run.

    Of several budgets also a table of each accuracy of each profile: methods by budgets.
    """
    against = _against_budget(runs)
    budget = runs["budget"].min()
    runs = runs[runs["budget"] == budget]
    table, profiles = summary(runs, ["profile"]), list(dict.fromkeys(runs["profile"]))
    methods = order(runs)
    header = ["method", *profiles]
    for name in profiles:
        if table.loc[name]["mean", "joint"].notna().any():
            header.insert(header.index(name) + 1, f"{name}, joint")
    header += ["MACs (x)", "latency (x)", "seconds"]
    lines = []
    for method in methods:
        line = [method]
        for name in header[1:-3]:
            profile, _, joint = name.partition(", ")
            line.append(_cell(table, (profile, method), "joint" if joint else "accuracy"))
        own = runs[runs["method"] == method]
        line += [_mean(own[name]) for name in ("macs", "latency", "seconds")]
        lines.append(line)
    seeds = int(table["seeds"].max())
    images = ", ".join(map(str, sorted(set(runs["images"].dropna().astype(int)))))
    text = [
        f"Average accuracy over the tasks in percent at budget {budget:g}: mean and standard deviation over "
        f"{seeds} seed{'s' if seeds > 1 else ''}.",
        f"Calibration images per task: {images}. Costs are relative to one source; seconds: matching and fit.",
    ]
    return "\n\n".join(["# All experiments", _pipe(lines, header), "\n".join(text), *against]) + "\n"


def _against_budget(runs: pd.DataFrame) -> list[str]:
    """Sections of markdown: one for each profile and accuracy, methods by budgets; none for a single budget."""
    budgets = sorted(set(runs["budget"]))
    found = []
    for profile, own in runs.groupby("profile", sort=False):
        table, methods = summary(own, ["budget"]), order(own)
        for metric, title in ACCURACIES.items():
            if len(budgets) > 1 and own[metric].notna().any():
                lines = [[m, *(_cell(table, (budget, m), metric) for budget in budgets)] for m in methods]
                header = ["budget", *(f"{budget:g}" for budget in budgets)]
                found += [f"## {profile}: {title}", _pipe(lines, header)]
    return found


def with_joint(runs: pd.DataFrame) -> pd.DataFrame:
    """``runs`` and, where there is one, the joint accuracy as the accuracy of a profile of its own."""
    joint = runs[runs["joint"].notna()]
    joint = joint.assign(profile=joint["profile"] + ", joint", accuracy=joint["joint"])
    return pd.concat([runs, joint]).sort_values([*RUN], kind="stable").reset_index(drop=True)


def _pipe(lines: list[list[str]], header: list[str]) -> str:
    aligned = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(lines, header, "pipe", colalign=aligned, disable_numparse=True)


def order(runs: pd.DataFrame) -> list[str]:
    """Methods from the worst to the best on average over profiles, the references last."""
    means = runs.groupby(["method", "profile"])["accuracy"].mean().groupby("method").mean()
    methods = means.sort_values().index
    return [m for m in methods if m not in REFERENCES] + [m for m in REFERENCES if m in methods]


def _cell(table: pd.DataFrame, key: tuple[str, str], metric: str) -> str:
    if key not in table.index or pd.isna(table.loc[key, ("mean", metric)]):
        return "-"
    mean, deviation = table.loc[key, ("mean", metric)], table.loc[key, ("std", metric)]
    return f"{mean:.1f}" if pd.isna(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def _mean(values: pd.Series) -> str:
    mean = pd.to_numeric(values).mean()
    return "-" if pd.isna(mean) else f"{mean:.2f}"
