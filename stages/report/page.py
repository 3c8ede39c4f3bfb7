"""The report as one page of HTML that needs nothing else: no network, no other file.

The page itself is page.html, a template; here is what fills it. ``Table`` is a caption, columns and rows of text, which
the page's script sorts by the numbers in them.
"""

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from stages.core.settings.params import Params
from stages.report import tables
from stages.report.experiments import MEASURES, order, summary

PAGE = "index.html"
CAPTIONS = {
    "accuracy": "Accuracy of every method",
    "accuracy_cost": "Accuracy against cost",
    "similarity": "How alike the paired units are",
    "ridge": "The ridge that was chosen for each layer",
    "residual": "What the fits leave unexplained",
    "separate": "Units that stay separate",
    "method_comparison": "Methods side by side",
    "accuracy_vs_budget": "Accuracy against budget",
    "ablation": "Alignments and fits",
}
ALTERNATIVES = {  # what a picture shows, for who cannot see it; the numbers are in the tables
    "accuracy": "Bars: the average accuracy of each method, a mark for each task, lines for ensemble and oracle.",
    "accuracy_cost": "Points: average accuracy of each method against its cost; up and left is better.",
    "similarity": "Lines: correlation of paired units for each matching, group by group, and by position.",
    "ridge": "Lines: the ridge with which each method's fit of a layer errs least on images held out, layer by layer.",
    "residual": "Lines: what the fit of each method leaves unexplained, layer by layer.",
    "separate": "Bars: the share of units that each matching keeps separate, group by group.",
    "method_comparison": "Bars: the average accuracy of every method, a panel for each profile.",
    "accuracy_vs_budget": "Lines: the average accuracy of every method against the budget, a panel for each profile.",
    "ablation": "A grid: the average accuracy of every alignment (rows) with every fit (columns).",
}


@dataclass(frozen=True)
class Column:
    """A heading; ``text``: what stands under it is read from the left; ``code``: and is a name or a hash."""

    name: str
    text: bool = False
    code: bool = False


@dataclass(frozen=True)
class Line:
    cells: Sequence[str]
    best: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Line] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A PNG picture inside the page."""

    caption: str
    alt: str
    uri: str
    width: int
    height: int


def report_page(
    params: Params,
    metrics: tables.Metrics,
    timings: Mapping[str, Mapping[str, float]],
    allocations: Mapping[str, pd.DataFrame],
    fits: Mapping[str, pd.DataFrame],
    pictures: Mapping[str, bytes],
    hashes: Mapping[str, str],
    at_chance: Sequence[str],
) -> str:
    """The page of one run. hashes: file -> sha256; the other arguments are those of the other reports."""
    header, rows = tables.cells(metrics, timings)
    best = tables.best_methods(metrics)
    results = Table(
        "results",
        "Accuracy in percent; costs and latency relative to one source network; seconds: matching and fit",
        _columns(header),
        [Line(cells, cells[0] in best) for cells in rows],
    )
    sections = [
        {"title": "Widths", "text": "Units of each group in one source network, and in the merged one.",
         "table": _widths(allocations, len(params.active.tasks))},
        {"title": "Residuals", "text": "What the fit of a layer leaves unexplained: energy of residual over target. "
         "Targets differ between methods.", "table": _residuals(fits)},
        {"title": "Hashes", "text": "SHA-256 of the networks these numbers are of.", "table": _hashes(hashes)},
    ]  # fmt: skip
    return _render(
        title=f"Merged networks: {params.profile}",
        caption=f"profile {params.profile}, budget {params.budget:g}, seed {params.seed}",
        lead=_lead(metrics, best),
        warnings=[tables.chance_warning(task) for task in at_chance],
        results=results,
        choosers=[],
        notes=["oracle: each source network on its own task. ensemble: all source networks side by side."],
        pictures=_pictures(pictures),
        load=_load(params, best[0]) if best else "",
        sections=[section for section in sections if section["table"].rows],
        parameters=_parameters(params),
    )


def experiments_page(runs: pd.DataFrame, pictures: Mapping[str, bytes]) -> str:
    """The page of many experiments (``experiments.read_runs``): mean and spread over seeds, with a chooser."""
    table = summary(runs, ["profile", "budget"])
    metrics = [name for name in MEASURES if table["mean", name].notna().any()]
    rows = []
    for (profile, budget), own in table.groupby(level=["profile", "budget"], sort=False):
        for method in order(runs):
            if (profile, budget, method) in own.index:
                line = own.loc[(profile, budget, method)]
                rows.append(Line([method, profile, f"{budget:g}", *(_mean(line, name) for name in metrics),
                                 f"{line['seeds', '']:.0f}"]))  # fmt: skip
    columns = [
        Column("method"),
        Column("profile", text=True),
        *_columns(["budget", *metrics, "seeds"], first=False),
    ]
    choosers = [
        {"name": name, "column": index, "choices": list(dict.fromkeys(row.cells[index] for row in rows))}
        for name, index in (("profile", 1), ("method", 0), ("budget", 2))
    ]
    return _render(
        title="Merged networks: all experiments",
        caption=f"{runs['experiment'].nunique()} experiments, {len(runs)} results",
        lead="",
        warnings=[],
        results=Table("results", "Mean ± standard deviation over seeds; accuracy in percent, costs relative to one "
                      "source network", columns, rows),
        choosers=choosers,
        notes=["oracle: each source network on its own task. ensemble: all source networks side by side."],
        pictures=_pictures(pictures),
        load="",
        sections=[],
        parameters="",
    )  # fmt: skip


def _render(**values: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html").render(**values) + "\n"


def _columns(names: Iterable[str], first: bool = True) -> list[Column]:
    return [Column(name, text=first and index == 0) for index, name in enumerate(names)]


def _lead(metrics: tables.Metrics, best: Sequence[str]) -> str:
    """One sentence: the best network, its cost, and what the networks side by side give."""
    scores = tables.average_accuracies(metrics)
    if not best:
        return ""
    macs = metrics[best[0]][tables.AVERAGE].get("macs")
    cost = f" at {macs:.2f} times the cost of one source network" if macs is not None else ""
    others = [f"the {name} has {scores[name]:.1f} %" for name in tables.REFERENCES if name in scores]
    sentence = f"Best merged network: {' and '.join(best)}, {scores[best[0]]:.1f} % on average{cost}"
    return "; ".join([sentence, *others]) + "."


def _widths(allocations: Mapping[str, pd.DataFrame], networks: int) -> Table:
    groups = list(dict.fromkeys(group for table in allocations.values() for group in table["group"]))
    units = {row.group: row.units for table in allocations.values() for row in table.itertuples()}
    merged = {
        name: {row.group: row.shared + networks * row.separate for row in table.itertuples()}
        for name, table in allocations.items()
    }
    rows = [
        Line([group, f"{units[group]:.0f}", *(_number(own.get(group), "{:.0f}") for own in merged.values())])
        for group in groups
    ]
    return Table("widths", "Units by group and matching", _columns(["group", "one source", *merged]), rows)


def _residuals(fits: Mapping[str, pd.DataFrame]) -> Table:
    means = {name: table.groupby("layer", sort=False)["residual"].mean() for name, table in fits.items()}
    layers = list(dict.fromkeys(layer for own in means.values() for layer in own.index))
    rows = [Line([layer, *(_number(own.get(layer), "{:.4f}") for own in means.values())]) for layer in layers]
    return Table("residuals", "Residual by layer and method", _columns(["layer", *means]), rows)


def _hashes(hashes: Mapping[str, str]) -> Table:
    columns = [Column("file", text=True), Column("sha256", text=True, code=True)]
    return Table("hashes", "SHA-256 of network files", columns, [Line(pair) for pair in hashes.items()])


def _pictures(pictures: Mapping[str, bytes]) -> list[Picture]:
    found = []
    for name, content in pictures.items():
        stem = name.removesuffix(".png")
        width, height = struct.unpack(">II", content[16:24])  # of the header chunk
        uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        found.append(Picture(CAPTIONS.get(stem, stem), ALTERNATIVES.get(stem, stem), uri, width, height))
    return found


def _load(params: Params, method: str) -> str:
    """The lines of Python that load and use the best network."""
    task, own = next(iter(params.active.tasks.items()))
    data, separate = own.data, params.active.labels == "separate"
    told = f', task="{task}"' if separate else ""
    shape = f"(n, {data.channels}, {data.size}, {data.size})"
    return "\n".join(
        [
            "import torch",
            "from stages import load_merged",
            "",
            f'network = load_merged("models/recalibrate/{method}.safetensors")',
            f"mean, std = torch.tensor({data.mean}), torch.tensor({data.std})  # as task {task}",
            f"images = torch.rand{(8, data.channels, data.size, data.size)}  # {shape}, in 0 to 1",
            f"logits = network((images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1){told})",
        ]
    )


def _parameters(params: Params) -> str:
    used = {method["match"] for method in params.methods.values() if "match" in method}
    found = {
        **{name: getattr(params, name) for name in ("profile", "budget", "seed")},
        "match": {name: own for name, own in params.match.items() if name in used},
        "methods": params.methods,
        "profiles": {params.profile: params.active.model_dump(exclude_unset=True)},
    }
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=100)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or pd.isna(value) else form.format(value)


def _mean(line: pd.Series, name: str) -> str:
    mean, deviation = line["mean", name], line["std", name]
    form = "{:.1f}" if name in ("accuracy", "joint", "probe") else "{:.2f}"
    if pd.isna(mean) or pd.isna(deviation):
        return _number(mean, form)
    return f"{form.format(mean)} ± {form.format(deviation)}"
