"""Print the last report's table and where its pictures are: ``python -m stages.report.show``."""

import sys
from pathlib import Path

from stages.core.runtime.command import command
from stages.core.runtime.errors import InputError
from stages.core.runtime.files import read_json
from stages.report import tables


def main() -> None:
    """Reads reports/metrics.json, timings.json and the title of table.md.

    Raises InputError when one of them is missing or not what the report stage writes.
    """
    sys.stdout.write(shown(Path("reports")))


def shown(folder: Path) -> str:
    """The text to print for a folder of reports. Raises InputError as ``main`` does."""
    try:
        metrics, timings = read_json(folder / tables.METRICS), read_json(folder / tables.TIMINGS)
        first, *lines = (folder / tables.TABLE).read_text().splitlines()
        title = first.lstrip("# ")
        table = tables.terminal(metrics, timings, title)
    except (InputError, FileNotFoundError) as error:
        raise InputError(f"{folder}: no report here yet ({error}); {tables.REPAIR}") from error
    except (AttributeError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{folder}: {tables.METRICS} is not a report's; {tables.REPAIR}") from error
    paths = [folder / "index.html", folder / tables.TABLE, *sorted((folder / "plots").glob("*.png"))]
    warnings = [line.replace(tables.WARNING, "warning") for line in lines if line.startswith(tables.WARNING)]
    return "\n".join([table, *warnings, *(f"  {path}" for path in paths)]) + "\n"


if __name__ == "__main__":
    command(main)
