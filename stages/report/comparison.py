"""Pictures of many experiments: methods side by side, accuracy against budget, and which half does the work."""

from collections.abc import Iterator

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.report.experiments import order, summary
from stages.report.style import GREY, STYLE, colours, png
from stages.report.tables import REFERENCES

COMPARED = ("identity", "weights", "activations", "mudsc", "zipit", "cca_merge", "ot_fusion")
FITS = ("average", "regmean", "source, ensemble", "source, own, folded", "merged, own, folded")
FIT_NAMES = {
    "source, ensemble": "PLeaS",
    "merged, own, folded": "progressive",
    "source, own, folded": "source, own",
}


def comparisons(runs: pd.DataFrame) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG bytes) of the pictures that these runs (``experiments.read_runs``) are enough for."""
    smallest = runs[runs["budget"] == runs["budget"].min()]
    with matplotlib.style.context(["default", STYLE]):
        yield "method_comparison.png", png(method_comparison(smallest))
        if runs["budget"].nunique() > 1:
            yield "accuracy_vs_budget.png", png(accuracy_vs_budget(runs))
        plain = smallest[(smallest["recalibration"] == "batchnorm") & smallest["matching"].isin(COMPARED)]
        if plain["matching"].nunique() > 1 and plain["fit"].nunique() > 1:
            yield "ablation.png", png(ablation(plain))


def method_comparison(runs: pd.DataFrame) -> Figure:
    """Bars of the average accuracy of every method, one panel for each profile; whiskers are one deviation."""
    table, methods, profiles = summary(runs, ["profile"]), order(runs), _profiles(runs)
    palette = colours(methods)
    figure, panels = _panels(
        profiles, 3.4, 1.6 + 0.27 * len(methods), f"Average accuracy, {_caption(runs)}", True
    )
    for axes, profile in zip(panels, profiles, strict=True):
        own = table.loc[profile].reindex(methods)
        means, deviations = own["mean", "accuracy"], own["std", "accuracy"].fillna(0)
        shades = ["white" if m in REFERENCES else palette[m] for m in methods]
        edges = ["black" if m in REFERENCES else palette[m] for m in methods]
        axes.barh(
            range(len(methods)), means.fillna(0), xerr=deviations, color=shades, edgecolor=edges, ecolor=GREY
        )
        for row, mean in enumerate(means):
            axes.text(101, row, "-" if pd.isna(mean) else f"{mean:.1f}", va="center", size=8)
        for name, style in (("oracle", "-"), ("ensemble", "--")):
            if name in means.index and not pd.isna(means[name]):
                axes.axvline(means[name], color="black", linestyle=style, linewidth=0.9)
        axes.set(xlim=(0, 100), title=profile, xlabel="accuracy (%)", ylim=(-0.6, len(methods) - 0.4))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(methods)), methods)
    return figure


def accuracy_vs_budget(runs: pd.DataFrame) -> Figure:
    """Lines of the average accuracy against the budget, one panel for each profile; bands are one deviation."""
    several = runs.groupby(["profile", "method"])["budget"].transform("nunique") > 1
    curves = runs[several]
    profiles = _profiles(curves)
    table = summary(curves, ["profile", "budget"])
    methods = [m for m in reversed(order(curves)) if m not in REFERENCES]
    palette = colours(methods)
    figure, panels = _panels(profiles, 4.6, 4.8, f"Accuracy against budget, {_caption(curves)}", False)
    for axes, profile in zip(panels, profiles, strict=True):
        own = table.loc[profile]
        for method in methods:
            if method not in own.index.get_level_values("method"):
                continue
            line = own.xs(method, level="method").sort_index()
            x, y = line.index.to_numpy(float), line["mean", "accuracy"].to_numpy(float)
            spread = line["std", "accuracy"].fillna(0).to_numpy(float)
            axes.plot(x, y, marker="o", ms=4, color=palette[method], label=method)
            axes.fill_between(x, y - spread, y + spread, color=palette[method], alpha=0.12, linewidth=0)
        _references(axes, own)
        axes.set(title=profile, xlabel="budget (multiply-accumulates, x one source)")
    panels[0].set_ylabel("average accuracy (%)")
    handles = {
        h.get_label(): h for axes in panels for h in axes.get_lines() if not h.get_label().startswith("_")
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure


def _references(axes: Axes, table: pd.DataFrame) -> None:
    for name, style in (("oracle", "-"), ("ensemble", "--")):
        if name in table.index.get_level_values("method"):
            mean = float(table.xs(name, level="method")["mean", "accuracy"].mean())
            axes.axhline(mean, color="black", linestyle=style, linewidth=1, label=name)


def ablation(runs: pd.DataFrame) -> Figure:
    """Alignment x fit, one panel for each profile: which half does the work."""
    profiles = _profiles(runs)
    rows = [name for name in COMPARED if name in set(runs["matching"])]
    columns = [name for name in FITS if name in set(runs["fit"])]
    figure, panels = _panels(
        profiles,
        1.3 + 0.78 * len(columns),
        1.9 + 0.42 * len(rows),
        f"Alignment (rows) and fit (columns), {_caption(runs)}",
        True,
    )
    for axes, profile in zip(panels, profiles, strict=True):
        own = runs[runs["profile"] == profile]
        cells = own.pivot_table("accuracy", "matching", "fit", "mean").reindex(index=rows, columns=columns)
        axes.imshow(cells.to_numpy(float), cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(cells.to_numpy(float)):
            shown = "" if np.isnan(value) else f"{value:.1f}"
            axes.text(
                column, row, shown, ha="center", va="center", color="black" if value > 60 else "white", size=9
            )
        axes.set_xticks(
            range(len(columns)), [FIT_NAMES.get(name, name) for name in columns], rotation=30, ha="right"
        )
        axes.set(title=profile)
        axes.grid(visible=False)
    panels[0].set_yticks(range(len(rows)), rows)
    return figure


def _panels(
    profiles: list[str], width: float, height: float, title: str, share: bool
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.8 + width * len(profiles), height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=12)
    return figure, list(figure.subplots(1, len(profiles), squeeze=False, sharey=share)[0])


def _profiles(runs: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(runs["profile"]))


def _caption(runs: pd.DataFrame) -> str:
    seeds = runs["seed"].nunique()
    budgets = sorted(set(runs["budget"]))
    budget = f"budget {budgets[0]:g}" if len(budgets) == 1 else f"budgets {budgets[0]:g} to {budgets[-1]:g}"
    return f"{budget}, mean of {seeds} seed{'s' if seeds > 1 else ''}"
