"""The model card of each merged network, with what was measured of it: models/recalibrate/*.md -> reports/cards."""

from collections.abc import Mapping
from pathlib import Path

from stages.core.runtime.errors import InputError
from stages.report import tables

CARDS = Path("models/recalibrate")


def read_card(method: str, folder: Path = CARDS) -> str:
    """What the recalibrate stage wrote. Raises InputError when it is not there."""
    path = folder / f"{method}.md"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no such file, or no text; {tables.REPAIR}") from error


def complete(
    text: str,
    method: str,
    metrics: tables.Metrics,
    timings: Mapping[str, Mapping[str, float]],
    hashes: Mapping[str, str],
) -> str:
    """The card with accuracies, costs and latency beside those of the references, and the hash of its file."""
    rows = {row: metrics[row] for row in (method, *tables.REFERENCES) if row in metrics}
    header, cells = tables.cells(rows, {row: timings.get(row, {}) for row in rows})
    lines = [header, ["---"] * len(header), *cells]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    file = [f"- {path}: {own}" for path, own in hashes.items() if Path(path).stem == method]
    parts = [
        text.rstrip(),
        "## Measured",
        table,
        "Accuracy in percent on test images; costs and latency relative to one source network.",
        *(["File (sha256):\n\n" + "\n".join(file)] if file else []),
    ]
    return "\n\n".join(parts) + "\n"
