"""The report completes the cards of the merged networks with what was measured."""

import pytest

from stages.core.runtime.errors import InputError
from stages.report.__main__ import main

TWO = {
    "average": (30.0, 40.0),
    "progressive": (98.0, 97.9),
    "ensemble": (64.0, 66.5),
    "oracle": (99.75, 99.8),
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("stages.report.__main__.pictures", lambda *_: [])


def test_a_card_has_the_row_of_its_network_and_the_references(make_reports):
    reports = make_reports(accuracies=TWO)
    (reports / "probe/progressive.latency.json").write_text('{"latency": 1.25, "executed": 1.5}')
    main()
    assert {path.name for path in (reports / "cards").iterdir()} == {"average.md", "progressive.md"}
    text = (reports / "cards/progressive.md").read_text()
    assert text.startswith("# progressive: one network\n")
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("| method"))
    row = dict(
        zip(cells(header), cells(next(line for line in lines if line.startswith("| prog"))), strict=True)
    )
    assert (row["upright"], row["rotated"]) == ("98.0", "97.9")
    assert (row["executed (x)"], row["latency (x)"]) == ("1.50", "1.25")
    assert any(line.startswith("| ensemble") for line in lines)
    assert not any(line.startswith("| average") for line in lines)
    assert "- models/progressive.safetensors: " in text


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_card_that_is_missing_is_said_in_one_line(make_reports):
    reports = make_reports(accuracies=TWO)
    (reports.parent / "models/recalibrate/average.md").unlink()
    with pytest.raises(
        InputError, match=r"models/recalibrate/average.md: no such file, or no text; run: dvc repro"
    ):
        main()
