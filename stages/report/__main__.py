"""Gather what the earlier stages measured into reports/: two metric files, a table and pictures.

Reads reports/{probe,match,allocate,fit}/; writes metrics.json, latency.json, table.md and plots/*.png.
"""

from pathlib import Path

from stages.core.artifacts import write_bytes, write_json, write_text
from stages.core.command import command
from stages.core.params import load_params
from stages.report import tables
from stages.report.plots import pictures


def main() -> None:
    """Raises InputError when a file of an earlier stage is missing or malformed."""
    params, folder = load_params(), Path("reports")
    rows = [*params.methods, *tables.REFERENCES]
    metrics = tables.collect_metrics(tables.read_probes(folder / "probe", rows, params.active.tasks))
    latencies = tables.collect_latencies(tables.read_latencies(folder / "probe", rows))
    matches = {
        name: tables.read_columns(
            folder / "match" / f"{name}.csv", ["group", "network"], ["similarity", "unmatched"]
        )
        for name, matching in params.matchings.items()
        if matching.by != "identity"  # pairs by position: the `unmatched` column of the others
    }
    allocations = {
        name: tables.read_columns(
            folder / "allocate" / f"{name}.csv", ["group"], ["units", "shared", "separate", "fraction"]
        )
        for name in params.matchings
    }
    fits = {
        name: tables.read_columns(folder / "fit" / f"{name}.csv", ["layer"], ["residual"])
        for name, method in params.methods.items()
        if method.fit.solver != "average"
    }
    caption = f"{params.profile}, budget {params.budget}, seed {params.seed}"
    write_json(folder / tables.METRICS, metrics)
    write_json(folder / tables.LATENCY, latencies)
    write_text(folder / tables.TABLE, tables.markdown(metrics, latencies, f"Merged networks: {caption}"))
    for name, content in pictures(metrics, matches, allocations, fits, params.budget, caption):
        write_bytes(folder / "plots" / name, content)


if __name__ == "__main__":
    command(main)
