"""Gather what the earlier stages measured into reports/: two metric files, a table, pictures and a page.

Reads reports/{probe,match,allocate,fit}/ and the cards in models/recalibrate/; writes metrics.json, timings.json,
table.md, plots/*.png, cards/*.md and index.html.

python -m stages.report --experiments [commits | folder ...]    of all experiments: mean and spread, pictures
"""

import sys
from pathlib import Path

from stages.core.recipe.recipe import load_recipe
from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError, some
from stages.core.runtime.files import write_bytes, write_json, write_text
from stages.core.settings.params import load_params
from stages.core.settings.yaml_text import read_whole
from stages.report import tables
from stages.report.cards import complete, read_card
from stages.report.page import PAGE, experiments_page, report_page
from stages.report.plots import pictures


def main(*words: str) -> None:
    """``--experiments [commits | folder ...]``: of all experiments instead.

    Raises InputError when a file of an earlier stage is missing or malformed.
    """
    if words:
        return experiments(*words)
    params, folder = load_params(), Path("reports")
    recipe = load_recipe(params)
    rows = [*recipe.methods, *tables.REFERENCES]
    metrics = tables.collect_metrics(tables.read_probes(folder / "probe", rows, params.active.tasks))
    at_chance = tables.read_at_chance(folder / "probe", params.active.tasks)
    timings = tables.collect_timings(
        **{
            kind: {row: tables.read_time(folder / "probe" / f"{row}.latency.json", kind) for row in rows}
            for kind in ("executed", "latency")
        },
        seconds={row: seconds(folder, row, method.match) for row, method in recipe.methods.items()},
    )
    matches = {
        name: tables.read_columns(
            folder / "match" / f"{name}.csv", ["group", "network"], ["similarity", "unmatched"]
        )
        for name, matching in recipe.matchings.items()
        if matching.by != "identity"  # pairs by position: the `unmatched` column of the others
    }
    allocations = {
        name: tables.read_columns(
            folder / "allocate" / f"{name}.csv", ["group"], ["units", "shared", "separate", "fraction"]
        )
        for name in recipe.matchings
    }
    fits = {
        name: table
        for name, method in recipe.methods.items()
        if method.fit.solver != "average"
        # nothing is fitted where everything is separate
        and len(
            table := tables.read_columns(
                folder / "fit" / f"{name}.csv", ["layer"], ["residual", "ridge"], empty=True
            )
        )
    }
    caption = f"{params.profile}, budget {params.budget}, seed {params.seed}"
    write_json(folder / tables.METRICS, metrics)
    write_json(folder / tables.TIMINGS, timings)
    title = f"Merged networks: {caption}"
    write_text(folder / tables.TABLE, tables.markdown(metrics, timings, title, at_chance))
    drawn = dict(pictures(metrics, matches, allocations, fits, params.budget, caption))
    for name, content in drawn.items():
        write_bytes(folder / "plots" / name, content)
    hashes = tables.read_hashes(folder / "probe", rows)
    for name in recipe.methods:
        text = complete(read_card(name), name, metrics, timings, hashes)
        write_text(folder / "cards" / f"{name}.md", text)
    text = report_page(params, metrics, timings, allocations, fits, drawn, hashes, at_chance)
    write_text(folder / PAGE, text)


def seconds(folder: Path, method: str, match: str) -> float | None:
    """Time to merge: matching and fit."""
    times = [
        tables.read_time(folder / kind / f"{name}.seconds.json", "seconds")
        for kind, name in (("match", match), ("fit", method))
    ]
    return None if None in times else sum(times)


def experiments(option: str, *words: str) -> None:
    """Write reports/experiments/ and show its table. Raises InputError for other words, and when there is nothing."""
    from stages.report.comparison import comparisons
    from stages.report.experiments import markdown, read_runs, with_joint

    counted = len(words) == 1 and words[0].isdecimal() and int(words[0][:9]) > 0
    commits, folders = (int(words[0][:9]), []) if counted else (1, [Path(word) for word in words])
    lost = [folder for folder in folders if not folder.is_dir()]
    if option != "--experiments" or lost:
        found = f"{some(lost)}, no folder" if option == "--experiments" else " ".join([option, *words])
        raise InputError(
            f"report: found {found}; allowed: nothing, or --experiments, a number of commits or folders of other clones"
        )
    if not folders:
        read_whole(Path("params.yaml"))  # gate: the reports of dvc's experiments belong to their top folder
    folder, runs = Path("reports/experiments"), read_runs(commits, folders)
    write_text(folder / "runs.csv", runs.to_csv(index=False))
    write_text(folder / "table.md", text := markdown(runs))
    drawn = dict(comparisons(with_joint(runs)))
    for name, content in drawn.items():
        write_bytes(folder / name, content)
    write_text(folder / PAGE, experiments_page(runs, drawn))
    sys.stdout.write(f"{text}\n  {folder / PAGE}\n  {folder / 'runs.csv'}\n")


if __name__ == "__main__":
    command(main, "...")
