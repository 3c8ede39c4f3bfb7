"""What refining brings, by what it starts from: python -m benchmarks refining [ROW ...] [--images N ...]

Rows of the full list, without their own refining, then refined for so many steps on so many images a task (statistics
and fit see no more of them either), at every budget, in blocks or dense; 0 steps: as it is. The networks are those
that the finetune stage left in this workspace, with the parameters of its params.yaml. One line of JSON for each
network, on standard output or at the end of a file; --draw makes a picture of such files and runs nothing.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from stages.allocate.solve import check_budget
from stages.allocate.splits import split_units
from stages.core.align.order import align
from stages.core.align.solve import make_alignment
from stages.core.handover.calibration import load_calibration, load_pools
from stages.core.handover.networks import load_sources
from stages.core.recipe.known import known_methods
from stages.core.recipe.methods import Refine
from stages.core.recipe.recipe import load_recipe
from stages.core.runtime.device import generator, prepare
from stages.core.runtime.errors import InputError
from stages.core.settings.params import load_params, nearest
from stages.core.units.moments import pool
from stages.fit.network import fit_network
from stages.match.matching import make_matching
from stages.own.parser import Parser
from stages.probe.__main__ import labelled
from stages.probe.candidates import reference_row
from stages.probe.evaluate import Candidate, OneForAll, accuracy, collect
from stages.recalibrate.recalibrate import recalibrate
from stages.statistics.moments import gather

ALL = "all"  # images: the fit sees as many as params.yaml says, refining those the sources were trained on as well


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m benchmarks refining", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", default=["progressive"], metavar="ROW", help="default: progressive"
    )
    parser.add_argument("--images", nargs="+", default=[2500], type=count_or_all)
    parser.add_argument("--steps", nargs="+", default=[800], type=int)
    parser.add_argument("--budget", nargs="+", default=[1.0], type=float)
    parser.add_argument("--layout", nargs="+", default=["blocks"], choices=("blocks", "dense"))
    parser.add_argument("--to", type=Path, help="a file of lines that the results are added to")
    parser.add_argument("--draw", nargs="+", type=Path, metavar="FILE", help="draw these lines into --to")
    given = parser.parse_args(words)
    if given.draw:
        lines = [line for path in given.draw for line in lines_of(path)]
        to = given.to or Path("refining.png")
        check_target(to)
        return draw(lines, to)
    if unknown := [row for row in given.rows if row not in known_methods().methods]:
        raise InputError(
            f"refining: found {unknown[0]}; allowed: {nearest(unknown[0], known_methods().methods)}"
        )
    numbers = [n for n in given.images if n != ALL]
    if min([1, *numbers]) < 1 or min(given.steps) < 0:
        parser.error("found a number that is too small; allowed: images from 1, steps from 0")
    if given.to:
        check_target(given.to)
    for found in study(given.rows, given.images, given.steps, given.budget, given.layout):
        line = json.dumps(found) + "\n"
        if given.to:
            with given.to.open("a") as file:
                file.write(line)
        else:
            sys.stdout.write(line)
            sys.stdout.flush()


def count_or_all(text: str) -> int | str:
    return text if text == ALL else int(text)


def check_target(path: Path) -> None:
    """Gate: before anything is reckoned. Raises InputError where a file could not be written."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--to: {path} cannot be written; allowed: a file in a folder that is there")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The results in a file. Raises InputError where it has none."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        missing = {"row", "images", "steps", "own", "own oracle", "seconds"} - set.intersection(
            *map(set, found)
        )
    except OSError as error:
        raise InputError(f"--draw: {path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"--draw: {path}: not lines of JSON ({error}); allowed: what --to wrote") from error
    if missing:
        raise InputError(f"--draw: {path}: {min(missing)} is not in every line; allowed: what --to wrote")
    return found


def study(
    rows: Sequence[str],
    images: Sequence[int | str],
    steps: Sequence[int],
    budgets: Sequence[float],
    layouts: Sequence[str] = ("blocks",),
) -> Iterator[dict[str, Any]]:
    """Accuracies in percent, means over the tasks, and CPU seconds of fit and refining of every combination."""
    params, known = load_params(), known_methods()
    for budget, layout in product(budgets, layouts):
        check_budget(budget, len(params.active.tasks), layout == "dense")
    device, recipe, labels = prepare(params.device, params.threads), load_recipe(params), params.active.labels
    sources, section, training = load_sources(params, device), recipe.fit, params.active.finetune
    test = labelled(params, recipe.probe, "test", device)
    widths = [len(source.task.classes) for source in sources] if labels == "separate" else None
    references = {
        name: scores(reference_row(name, sources, labels).candidate, test, widths)
        for name in ("oracle", "ensemble")
    }
    sweep = {
        "precision": getattr(torch, section.precision),
        "storage": section.storage,
        "memory": section.memory,
    }
    sweep["positions"] = section.positions
    for n in images:
        batches = load_calibration(params, section.images if n == ALL else n, section.batch_size, device)
        gathered = gather(sources, batches, **sweep, generator=generator(params.seed))
        statistics = pool(gathered, len(sources), len(sources))
        for name in rows:
            row, settings = known.methods[name], known.match[known.methods[name].match]
            matching, benefits = make_matching(sources, settings, statistics, generator(params.seed))
            for budget, layout in product(budgets, layouts):
                allocated = recipe.allocate.model_copy(update={"layout": layout}).spent(settings.allocate)
                splits, spent, base = split_units(
                    sources[0],
                    benefits,
                    budget,
                    len(sources),
                    labels,
                    allocated,
                )
                aligned = align(sources, matching, splits)
                alignment = make_alignment(settings, sources, lambda kept=statistics: kept, matching, splits)
                for count in steps:
                    refine = Refine(steps=count, images=n) if count else None
                    start = time.process_time()
                    network, _ = fit_network(
                        sources,
                        matching,
                        splits,
                        batches,
                        row.fit.model_copy(update={"refine": refine}),
                        labels=labels,
                        dense=allocated.dense,
                        alignment=alignment,
                        ridge=section.ridge,
                        **sweep,
                        generator=generator(params.seed),
                        unlabelled=refine and load_pools(params, n, refine.most, device),
                        shift=training.shift,
                        flip=training.flip,
                    )
                    seconds = time.process_time() - start
                    recalibrate(network, row.recalibrate, batches, aligned, alignment)
                    yield {
                        "profile": params.profile,
                        "seed": params.seed,
                        "row": name,
                        "images": n,
                        "budget": budget,
                        "layout": layout,
                        "cost": round(spent.cost / base, 3),
                        "steps": count,
                        **scores(OneForAll(network), test, widths),
                        **{f"{kind} {of}": v for of, own in references.items() for kind, v in own.items()},
                        "seconds": round(seconds, 1),
                        "refined": network.about.get("refined"),
                    }


def scores(
    candidate: Candidate, test: Sequence[tuple[Any, torch.Tensor]], widths: Sequence[int] | None
) -> dict[str, float]:
    """Percent right with the task known, and with nobody telling (joint) where heads have so many classes each."""
    own, joint, offset = [], [], 0
    for task, (batches, truth) in enumerate(test):
        logits, _ = collect(candidate, batches, task)
        if widths is None:
            own.append(accuracy(logits, truth))
            continue
        own.append(accuracy(logits[:, offset : offset + widths[task]], truth))
        joint.append(accuracy(logits, truth + offset))
        offset += widths[task]
    return {"own": round(mean(own), 3), **({"joint": round(mean(joint), 3)} if joint else {})}


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy relative to the oracle over images a task and over time, a curve for each row, steps and budget."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    curves: dict[tuple[str, int, float, str], dict[Any, list[Mapping[str, Any]]]] = {}
    for line in lines:
        key = (line["row"], line["steps"], line.get("budget", 1.0), line.get("layout", "blocks"))
        curves.setdefault(key, {}).setdefault(line["images"], []).append(line)
    several = [len({key[i] for key in curves}) > 1 for i in (2, 3)]
    order = sorted(
        {n for points in curves.values() for n in points}, key=lambda n: (n == ALL, n != ALL and n)
    )
    rows = sorted({key[0] for key in curves})
    for (row, steps, budget, layout), points in sorted(curves.items()):
        at = [n for n in order if n in points]
        values = [[100 * line["own"] / line["own oracle"] for line in points[n]] for n in at]
        off = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        seconds = [mean(line["seconds"] for line in points[n]) for n in at]
        words = [
            f"{steps} steps" if steps else "",
            f"{budget:g}x" if several[0] else "",
            layout if several[1] else "",
        ]
        style = {
            "label": ", ".join([row, *filter(None, words)]),
            "color": f"C{rows.index(row)}",
            "marker": "o" if budget == 1.0 else "s",
            "linestyle": "-" if steps else ":",
            "capsize": 3,
        }
        axes[0].errorbar([order.index(n) for n in at], [mean(v) for v in values], off, **style)
        axes[1].errorbar(seconds, [mean(v) for v in values], off, **{**style, "linestyle": "none"})
    axes[0].set_xticks(range(len(order)), [str(n) for n in order])
    axes[0].set(xlabel="images a task", ylabel="own heads, % of the oracle")
    axes[1].set(xlabel="CPU seconds of fit and refining", xscale="symlog", xlim=(-0.5, None))
    axes[0].legend(fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a suffix of no kind of picture
        raise InputError(f"--to: {path}: {error}") from error
