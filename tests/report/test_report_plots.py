import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from stages.report import plots
from stages.report.__main__ import main


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that the next run draws, in the order of ``pictures``."""
    drawn = []
    monkeypatch.setattr("stages.report.__main__.report_page", lambda *_: "")  # it takes whole pictures
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_pictures_carry_no_date_and_no_version(make_reports):
    reports = make_reports()
    main()
    for path in (reports / "plots").iterdir():
        content = path.read_bytes()
        assert not any(key in content for key in (b"tEXt", b"iTXt", b"tIME", b"atplotlib")), path.name
        assert size(path)[0] < 1700


def test_a_method_that_fitted_nothing_is_left_out(make_reports, figures):
    reports = make_reports(budget=2.0)
    (reports / "fit/pleas.csv").write_text("layer,residual,ridge\n")
    main()
    (drawn,) = [f for f in figures if f.axes[0].get_ylabel().startswith("residual")]
    assert "progressive" in texts(drawn)
    assert "pleas\n" not in texts(drawn) + "\n"
    for path in (reports / "fit").glob("*.csv"):
        path.write_text("layer,residual,ridge\n")
    main()
    assert any("No method is fitted" in texts(figure) for figure in figures)


def test_seventy_groups_are_named_by_block(make_reports, deep_groups, figures):
    assert len(deep_groups) >= 70
    make_reports(groups=deep_groups, budget=1.46)
    main()
    for figure in figures[2:]:
        names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert names == ["layer1", "layer2", "layer3", "layer4"]
    figures[2].canvas.draw()
    boxes = [label.get_window_extent() for label in figures[2].axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_many_names_without_blocks_are_thinned(make_reports, figures):
    make_reports(groups=[f"features.{index}" for index in range(80)])
    main()
    names = [label.get_text() for label in figures[2].axes[0].get_xticklabels()]
    assert names[:2] == ["features.0", "features.4"]
    assert len(names) == 20


def test_few_groups_are_all_named(make_reports, figures):
    make_reports()
    main()
    names = [label.get_text() for label in figures[2].axes[0].get_xticklabels()]
    assert names[0] == "conv1"
    assert len(names) == 6


def test_budget_one_says_that_everything_is_shared(make_reports, figures):
    make_reports()
    main()
    assert "Budget 1.0 keeps no unit separate: everything is shared" in texts(figures[5])
    assert "0 % in every group" in texts(figures[5])


def test_accuracy_names_the_best_method_and_the_references(make_reports, figures):
    make_reports()
    main()
    shown = texts(figures[0])
    for text in (
        "Best merged network: progressive, 98.2 %",
        "ensemble 65.2",
        "oracle 99.8",
        "upright",
        "37.2",
    ):
        assert text in shown
    assert "joint" not in shown


def test_separate_labels_mark_the_joint_accuracy(make_reports, figures):
    make_reports(profile="digits_split")
    main()
    assert "joint (mean)" in texts(figures[0])


@pytest.mark.parametrize("budget", [1.0, 1.46, 2.0])
def test_labels_beside_the_points_do_not_overlap(make_reports, figures, budget):
    accuracies = {f"method{index}": (90 + index / 50, 90.0) for index in range(12)}
    make_reports(budget=budget, accuracies=accuracies | {"ensemble": (90.1, 90.2), "oracle": (99.0, 99.0)})
    main()
    figures[1].canvas.draw()
    boxes = [text.get_window_extent() for text in figures[1].axes[0].texts if text.get_text()]
    assert len(boxes) >= 14
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_the_matching_by_position_is_the_baseline(make_reports, figures):
    make_reports()
    main()
    labels = [line.get_label() for line in figures[2].axes[0].get_lines()]
    assert labels == ["weights", "activations", "unmatched (by position)"]


def test_no_fitted_method_and_no_match_still_draw(make_reports, figures):
    reports = make_reports(accuracies={"average": (30, 40), "ensemble": (64, 66), "oracle": (99, 99)})
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(
        text.replace("by: weights", "by: identity").replace("by: activations", "by: identity")
    )
    assert not list((reports / "fit").glob("*.csv"))
    main()
    assert "Units are paired by position only" in texts(figures[2])
    assert "No method is fitted" in texts(figures[3])


def test_residuals_that_span_magnitudes_get_a_log_axis(make_reports, figures):
    reports = make_reports()
    (reports / "fit/pleas.csv").write_text(
        "layer,residual,ridge\nconv1,0.5,0.01\nlayer1.0.conv1,0.0001,\nlinear,0,1\n"
    )
    main()
    assert figures[3].axes[0].get_yscale() == "log"


def test_a_method_keeps_its_colour_whatever_is_beside_it():
    alone = plots.colours(["pleas"])["pleas"]
    assert plots.colours(["mine", "average", "pleas"])["pleas"] == alone
    built_in = plots.colours(
        ["average", "git_rebasin", "activation_matching", "pleas", "pleas_adam", "progressive"]
    )
    assert len(set(built_in.values())) == 6
    assert not set(plots.colours(["mine", "yours"]).values()) & set(built_in.values())


def test_spread_keeps_order_and_distance():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.uniform(0, 10, size=8)
        placed = plots.spread(values, 1.0, 0.0, 10.0)
        assert (np.argsort(placed) == np.argsort(values)).all()
        assert (np.diff(np.sort(placed)) > 1 - 1e-9).all()
        assert min(placed) > -1e-9
        assert max(placed) < 10 + 1e-9
    assert plots.spread([3.0, 7.0], 1.0, 0.0, 10.0) == [3.0, 7.0]


def test_the_ridge_of_each_layer_is_drawn_for_methods_that_have_one(make_reports, figures):
    reports = make_reports()
    for path in (reports / "fit").glob("*.csv"):
        path.write_text("layer,residual,ridge\nconv1,0.5,\nlinear,0.1,\n")
    (reports / "fit/pleas.csv").write_text("layer,residual,ridge\nconv1,0.5,0.01\nlinear,0.1,1\n")
    main()
    (drawn,) = [f for f in figures if f.axes[0].get_ylabel() == "ridge"]
    (line,) = drawn.axes[0].lines
    assert list(line.get_ydata()) == [0.01, 1]
