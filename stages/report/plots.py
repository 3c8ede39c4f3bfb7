"""The pictures of the report, as PNG bytes that depend on nothing but the numbers.

A colour belongs to a method or a matching, whatever else is in the picture (the palettes are Okabe and Ito's
and Tol's, made for colour-blind readers too). ``Palette`` is {name: colour}, in the order of drawing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.report.style import GREY, STYLE, colours, png
from stages.report.tables import AVERAGE, REFERENCES, Metrics, average_accuracies, best_methods

Palette = Mapping[str, str]
Tables = Mapping[str, pd.DataFrame]
Points = Mapping[str, tuple[float, float]]

_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps lines off a text
_MARKERS = "osD^vPX*"
_MANY = 24  # more names than this do not fit under an axis


def pictures(
    metrics: Metrics, matches: Tables, allocations: Tables, fits: Tables, budget: float, caption: str
) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, PNG bytes) of every picture.

    metrics: as in reports/metrics.json. matches, allocations: {matching: table of reports/match or allocate};
    fits: {method: table of reports/fit}. A matching by position is its own baseline and need not be among
    ``matches``. ``caption`` (profile, budget, seed) is printed on every picture.
    """
    methods = colours([row for row in metrics if row not in REFERENCES])
    matchings = colours(list(allocations))
    with matplotlib.style.context(
        ["default", STYLE]
    ):  # a reader's own matplotlibrc must not change the bytes
        for name, figure in (
            ("accuracy", _accuracy(metrics, methods, caption)),
            ("accuracy_cost", _accuracy_cost(metrics, methods, budget, caption)),
            ("similarity", _similarity(matches, matchings, caption)),
            ("residual", _residual(fits, methods, caption)),
            ("ridge", _ridge(fits, methods, caption)),
            ("separate", _separate(allocations, matchings, budget, caption)),
        ):
            yield f"{name}.png", png(figure)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions for labels of points at ``values``: as near as can be, ``gap`` apart, from low to high."""
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(order))
    free = np.asarray(values, dtype=float)[order] - steps  # where labels fit exactly when this does not fall
    rising = (np.maximum.accumulate(free) + np.minimum.accumulate(free[::-1])[::-1]) / 2
    placed = np.empty(len(order))
    placed[order] = np.clip(rising, low, max(low, high - gap * (len(order) - 1))) + steps
    return placed.tolist()


def _accuracy(metrics: Metrics, palette: Palette, caption: str) -> Figure:
    scores, best = average_accuracies(metrics), best_methods(metrics)
    title = "Average accuracy of each method"
    if best:
        winner = best[0] if len(best) == 1 else f"{len(best)} methods tie"
        title = f"Best merged network: {winner}, {scores[best[0]]:.1f} % on average"
    figure, axes = _figure(9, 2 + 0.48 * len(palette), title, f"{caption}; bar: mean of the tasks")
    side = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for row, (name, colour) in enumerate(palette.items()):
        axes.barh(row, scores.get(name, 0), color=colour, height=0.66)
        shown = f"{scores[name]:.1f}" if name in scores else "not measured"
        axes.text(1.02, row, shown, weight="bold" if name in best else "normal", **side)
    axes.text(1.02, -0.62, "mean", color=GREY, **side)
    tasks = [name for name in next(iter(metrics.values())) if name != AVERAGE]
    style = {"linestyle": "", "mfc": "white", "mec": "black", "ms": 6.5, "zorder": 4}
    for index, (task, offset) in enumerate(zip(tasks, np.linspace(-0.16, 0.16, len(tasks)), strict=True)):
        values = [metrics[name][task].get("accuracy", np.nan) for name in palette]
        heights = np.arange(len(values)) + offset  # side by side, or two equal tasks would hide each other
        axes.plot(values, heights, marker=_MARKERS[index % len(_MARKERS)], label=task, **style)
    joint = [metrics[name][AVERAGE].get("joint", np.nan) for name in palette]
    if not np.isnan(joint).all():
        axes.plot(joint, range(len(joint)), "|", color="black", ms=19, mew=3, label="joint (mean)", zorder=3)
    _reference_lines(axes, {name: scores[name] for name in REFERENCES if name in scores})
    axes.set(xlim=(0, 101), ylim=(max(1, len(palette)) - 0.5, -0.5), xlabel="accuracy (%)")
    axes.set_yticks(range(len(palette)), list(palette))
    for label in axes.get_yticklabels():
        label.set_weight("bold" if label.get_text() in best else "normal")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside right center", alignment="left", title="task")
    return figure


def _reference_lines(axes: Axes, scores: Mapping[str, float]) -> None:
    """Ensemble and oracle as vertical lines, labelled on top, one above the other if they are close."""
    close = len(scores) > 1 and np.ptp(list(scores.values())) < 25
    style = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    for name, score in scores.items():
        right = score > 85
        offset = (4 if right else 0, 17 if name == "oracle" and close else 3)
        axes.axvline(score, color="black", linestyle="-" if name == "oracle" else "--", zorder=2.5)
        axes.annotate(f"{name} {score:.1f}", (score, 1), offset, ha="right" if right else "center", **style)


def _accuracy_cost(metrics: Metrics, palette: Palette, budget: float, caption: str) -> Figure:
    scores, best = average_accuracies(metrics), best_methods(metrics)
    points = {n: (metrics[n][AVERAGE]["macs"], y) for n, y in scores.items() if "macs" in metrics[n][AVERAGE]}
    title = "Average accuracy against cost"
    if best and {best[0], "ensemble"} <= set(points):
        (cost, score), (double, other) = points[best[0]], points["ensemble"]
        title = f"{best[0]}: {score:.1f} % at {cost:.2f}x the cost; ensemble: {other:.1f} % at {double:.2f}x"
    height = max(4.8, 1.8 + 0.3 * len(palette))
    figure, axes = _figure(8.5, height, title, f"{caption}; up and left is better")
    most = max([2.0, budget, *(cost for name, (cost, _) in points.items() if name != "oracle")])
    low, high = min([99.0, *scores.values()]), max([1.0, *scores.values()])
    margin = max(0.1 * (high - low), 1.5)
    axes.set(xlim=(1 - 0.2 * (most - 1), most + 0.4 * (most - 1)), ylim=(low - margin, high + margin))
    axes.set(xlabel="cost (multiply-accumulates, x one source network)", ylabel="average accuracy (%)")
    axes.set_xticks(np.arange(1, most + 0.01, 0.25 if most < 3 else 0.5))
    axes.axvline(budget, color=GREY, linestyle=":")
    axes.text(budget, low - margin, f"budget {budget} ", color=GREY, va="bottom", ha="right")
    if "oracle" in scores:
        axes.axhline(scores["oracle"], color="black")
        side = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.01, scores["oracle"], f"oracle {scores['oracle']:.1f}", **side)
    if "ensemble" in points:
        axes.plot(*points["ensemble"], "s", mfc="none", mec="black", mew=2.2, ms=14, zorder=5)
        style = {"textcoords": "offset points", "va": "center", "bbox": _PLATE}
        axes.annotate(f"ensemble {scores['ensemble']:.1f}", points["ensemble"], (12, 0), **style)
    points = {name: points[name] for name in palette if name in points}
    if points:
        _label_points(axes, points, palette, best, scores.get("oracle", np.inf))
    return figure


def _label_points(axes: Axes, points: Points, palette: Palette, best: Sequence[str], ceiling: float) -> None:
    """A marker for each method and its name in a column beside them, tied to the marker by a thin line.

    No name is put across the line at ``ceiling`` unless a method is above it.
    """
    (first, last), (low, high) = axes.get_xlim(), axes.get_ylim()
    xs, ys = zip(*points.values(), strict=True)
    left = max(xs) > (first + last) / 2  # the side that has room
    column = min(xs) - 0.06 * (last - first) if left else max(xs) + 0.06 * (last - first)
    line = 0.22 / (axes.figure.get_figheight() - 1.6) * (high - low)  # a line of text, in percent
    top = ceiling if max(ys) <= ceiling else high
    heights = spread(ys, line, low + 1.2 * line, min(top, high) - 0.6 * line)
    for (name, (x, y)), height in zip(points.items(), heights, strict=True):
        axes.plot([x, column], [y, height], color=palette[name], linewidth=1)
        axes.plot(x, y, "o", color=palette[name], mec="white", ms=10, zorder=4)
        style = {"weight": "bold" if name in best else "normal", "ha": "right" if left else "left"}
        axes.text(column, height, f" {name} {y:.1f} ", va="center", bbox=_PLATE, **style)


def _similarity(matches: Tables, palette: Palette, caption: str) -> Figure:
    groups = _union(table["group"] for table in matches.values())
    columns = ["similarity", "unmatched"]
    means = {name: table.groupby("group")[columns].mean().reindex(groups) for name, table in matches.items()}
    title = "Units are paired by position only"
    if means:
        name = max(means, key=lambda name: means[name]["similarity"].mean())
        before, after = means[name]["unmatched"].mean(), means[name]["similarity"].mean()
        title = f"Matching by {name}: paired units correlate {after:.2f}, by position {before:.2f}"
    figure, axes = _figure_along(groups, "group of units", title, f"{caption}; mean over a group's units")
    for name, mean in means.items():
        _line(axes, mean["similarity"], color=palette[name], label=name)
    if means:
        baseline = pd.concat([mean["unmatched"] for mean in means.values()], axis=1).mean(axis=1)
        _line(axes, baseline, color=GREY, label="unmatched (by position)", linestyle="--")
        figure.legend(loc="outside right center", alignment="left", title="matching by")
    axes.set(ylim=(min(0.0, axes.get_ylim()[0]), 1.03), ylabel="correlation of paired units")
    return figure


def _residual(fits: Tables, palette: Palette, caption: str) -> Figure:
    layers = _union(table["layer"] for table in fits.values())
    title = "What the fit leaves unexplained, layer by layer" if fits else "No method is fitted"
    figure, axes = _figure_along(layers, "layer", title, f"{caption}; targets differ between methods")
    positive = [value for table in fits.values() for value in table["residual"] if value > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(1e-6, min(positive) / 2))  # what is below is rounding
    else:
        axes.set_ylim(0, 1.08 * max(positive, default=1))
    for name, table in fits.items():
        values = table.groupby("layer")["residual"].mean().reindex(layers)
        _line(axes, values, color=palette[name], label=name)
    if fits:
        figure.legend(loc="outside right center", alignment="left", title="method")
    axes.set_ylabel("residual energy / target energy")
    return figure


def _ridge(fits: Tables, palette: Palette, caption: str) -> Figure:
    fits = {name: table for name, table in fits.items() if table["ridge"].notna().any()}
    layers = _union(table["layer"] for table in fits.values())
    title = "The ridge of each layer" if fits else "No method has a ridge"
    figure, axes = _figure_along(layers, "layer", title, f"{caption}; relative to the mean diagonal of G")
    axes.set_yscale("log")
    axes.set_ylim(10**-4.2, 10**1.2)
    for name, table in fits.items():
        values = table.groupby("layer")["ridge"].median().reindex(layers)
        _line(axes, values.where(values > 0), color=palette[name], label=name)
    if fits:
        figure.legend(loc="outside right center", alignment="left", title="method")
    axes.set_ylabel("ridge")
    return figure


def _separate(allocations: Tables, palette: Palette, budget: float, caption: str) -> Figure:
    groups = _union(table["group"] for table in allocations.values())
    fractions = {n: t.groupby("group")["fraction"].mean() for n, t in allocations.items()}
    shares = {name: 100 * fraction.reindex(groups).fillna(0) for name, fraction in fractions.items()}
    most = max((share.max() for share in shares.values()), default=0)
    title = f"Where budget {budget} goes: units kept separate, by group"
    if most == 0:
        title = f"Budget {budget} keeps no unit separate: everything is shared"
    figure, axes = _figure_along(groups, "group of units", title, f"{caption}; % in the legend: of all units")
    width = 0.8 / max(1, len(shares))
    for index, (name, share) in enumerate(shares.items()):
        total = 100 * allocations[name]["separate"].sum() / max(1, allocations[name]["units"].sum())
        centres = np.arange(len(groups)) + (index - (len(shares) - 1) / 2) * width
        axes.bar(centres, share.to_numpy(), width, color=palette[name], label=f"{name} ({total:.0f} %)")
    if most == 0:
        axes.text(0.5, 0.5, "0 % in every group", transform=axes.transAxes, ha="center", color=GREY, size=16)
    axes.set(ylim=(0, 105 if most == 0 else min(105, 1.15 * most)), ylabel="separate units (% of the group)")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside right center", alignment="left", title="matching by")
    return figure


def _union(columns: Iterable[pd.Series]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(columns)))


def _figure(width: float, height: float, title: str, caption: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.55 / height))  # what is drawn stays below these two
    figure.text(0.01, 1 - 0.08 / height, title, weight="bold", size=12, va="top")
    figure.text(0.01, 1 - 0.32 / height, caption, size=9.5, color=GREY, va="top")
    return figure, figure.add_subplot()


def _line(axes: Axes, values: pd.Series, **style: str) -> None:
    axes.plot(values.to_numpy(), marker="o" if len(values) <= _MANY else "", linewidth=2, **style)


def _figure_along(names: Sequence[str], what: str, title: str, caption: str) -> tuple[Figure, Axes]:
    """A figure with names along its x axis; of very many, those of the blocks they form, or every few."""
    figure, axes = _figure(float(np.clip(4 + 0.5 * len(names), 8.5, 13)), 4.6, title, caption)
    total = f" ({len(names)} in all)" if len(names) > _MANY else ""
    axes.set(xlim=(-0.6, max(len(names), 1) - 0.4), xlabel=f"{what}, in the order of the forward pass{total}")
    blocks = _blocks(names) if len(names) > _MANY else []
    if blocks:
        for start, stop, _ in blocks[::2]:
            axes.axvspan(start - 0.5, stop - 0.5, color="#f3f3f3", zorder=0, linewidth=0)
        wide = [block for block in blocks if block[1] - block[0] > 0.009 * len(names) * len(block[2])]
        axes.set_xticks([(start + stop - 1) / 2 for start, stop, _ in wide], [name for _, _, name in wide])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
    else:
        shown = range(0, len(names), max(1, -(-len(names) // _MANY)))
        labels = [n if len(n) <= 24 else f"{n[:11]}…{n[-12:]}" for n in (names[index] for index in shown)]
        axes.set_xticks(list(shown), labels, rotation=40, ha="right", rotation_mode="anchor")
    return figure, axes


def _blocks(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Runs (start, stop, name) of names that begin alike, at the first depth that tells something, if any."""
    for depth in (1, 2):
        heads = [".".join(name.split(".")[:depth]) for name in names]
        runs = [(head, len(list(run))) for head, run in groupby(heads)]
        if len(runs) <= _MANY and max(length for _, length in runs) < 0.8 * len(names):
            stops = np.cumsum([length for _, length in runs]).tolist()
            return [(stop - length, stop, head) for (head, length), stop in zip(runs, stops, strict=True)]
    return []
