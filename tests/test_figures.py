"""The pictures of a run show its numbers, whole and legible."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from figures.look import place_labels, save
from figures.run import curves_figure, exit_figure, exit_rows


def results(exits: int, spread: float = 1.0) -> dict[str, float]:
    """Test metrics of a network whose early exits cost nearly the same where ``spread`` is small."""
    metrics = {"test/acc": 0.9, "test/macs": 2.4e7}
    for k in range(1, exits + 1):
        metrics |= {
            f"test/exit_{k}/acc": 0.9 + 0.03 * spread * (1 - math.exp(-k / 1.2)),
            f"test/exit_{k}/macs": 2e7 + 4e6 * spread * k,
            f"test/exit_{k}/fraction": 1 / exits,
        }
    return metrics


def test_the_rows_are_the_exits_in_order_and_the_operating_point() -> None:
    rows = exit_rows(dict(sorted(results(11).items())))
    assert [row.exit for row in rows] == [*map(str, range(1, 12)), "adaptive"]
    accuracy, macs, share = (results(11)[f"test/exit_2/{name}"] for name in ("acc", "macs", "fraction"))
    assert rows[1][1:] == (accuracy, macs, macs, 0, share, None)
    apart = exit_rows(results(11) | {"test/exit_2/device_macs": 1e6})[1]
    assert (apart.device, apart.server) == (1e6, macs - 1e6)
    assert rows[-1][1:] == (0.9, 2.4e7, 2.4e7, 0, 1, None)
    with pytest.raises(ValueError, match=r"Expected test/exit_1/acc among the metrics, got \['test/acc'\]"):
        exit_rows({"test/acc": 0.5})


@pytest.mark.parametrize("exits", [1, 3, 7])
def test_the_exits_are_drawn_where_they_are_and_named(exits: int, tmp_path) -> None:
    metrics = results(exits)
    figure = exit_figure(metrics, "a run")
    left, right = figure.axes
    expected = [[row.macs / 1e6, 100 * row.accuracy] for row in exit_rows(metrics)[:-1]]
    np.testing.assert_allclose(left.collections[0].get_offsets(), expected)
    assert [bar.get_height() for bar in right.patches] == pytest.approx([100 / exits] * exits)
    names = [text.get_text().split("\n")[0] for text in left.texts]
    assert names == [f"exit {k}" for k in range(1, exits + 1)] + (["adaptive"] if exits > 1 else [])
    save(figure, tmp_path / "figures" / "exits.png")
    assert matplotlib.image.imread(tmp_path / "figures" / "exits.png").shape == (660, 1440, 4)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["exits.png"]


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.0])
def test_names_are_legible_where_exits_are_close(spread: float) -> None:
    figure = exit_figure(results(7, spread), "a run")
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # of the words, not of what leads there
    dots = figure.axes[0].transData.transform(figure.axes[0].collections[0].get_offsets())
    for i, box in enumerate(boxes):
        assert not any(box.contains(x, y) for x, y in dots)
        assert not any(overlap(box, other) > 0.05 for other in boxes[i + 1 :])
        assert overlap(box, figure.axes[0].bbox) > 0.9


def overlap(box: Bbox, other: Bbox) -> float:
    """The part of the smaller one that they share."""
    shared = Bbox.intersection(box, other)
    areas = [part.width * part.height for part in (box, other)]
    return 0.0 if shared is None else shared.width * shared.height / min(areas)


def test_a_name_stands_beside_its_point_and_off_the_next() -> None:
    axes = exit_figure(results(2), "a run").axes[0]
    x, y = axes.transData.transform((25.0, 91.0))
    above = axes.transData.inverted().transform((x, y + 20))
    boxes = place_labels(axes, [(25.0, 91.0), (float(above[0]), float(above[1]))], ["here", "above"], ["black"] * 2)
    assert not any(box.contains(x, y) or box.contains(x, y + 20) for box in boxes)
    for box, height in zip(boxes, (y, y + 20), strict=True):
        assert math.hypot(x - (box.x0 + box.x1) / 2, height - (box.y0 + box.y1) / 2) < 60


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_curves_are_those_of_the_table(tmp_path) -> None:
    rows: list[dict[str, object]] = [
        {"phase": phase, "step": step, "val/exit_2/acc": 0.01 * step, "val/exit_10/acc": 0.02 * step,
         "val/acc": 0.5, "train/loss": 1 / step}
        for phase, step in (("backbone", 10), ("backbone", 20), ("exit_1", 30))
    ]  # fmt: skip
    figure = curves_figure(written(tmp_path / "metrics.csv", [*rows, {"phase": "exit_1", "step": 31, "test/acc": 0.5}]))
    upper, lower = figure.axes
    curves = {line.get_label(): line.get_xydata() for line in upper.lines}
    assert list(curves) == ["exit 2", "exit 10", "adaptive"]
    np.testing.assert_allclose(curves["exit 10"], [(10, 20), (20, 40), (30, 60)])
    np.testing.assert_allclose(lower.lines[0].get_xydata(), [(10, 0.1), (20, 0.05), (30, 1 / 30)])
    assert [text.get_text() for text in upper.texts] == ["backbone", "exit_1"]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in upper.patches]
    assert spans == [(0, 20), (20, 31)]


def test_a_run_without_validation_has_the_curve_of_its_loss(tmp_path) -> None:
    path = written(tmp_path / "metrics.csv", [{"phase": "plain", "step": 1, "train/loss": 2.0}])
    upper, lower = curves_figure(path).axes
    assert (len(upper.lines), len(lower.lines)) == (0, 1)
    with pytest.raises(ValueError, match="to hold the metrics of a run, got no row"):
        curves_figure(written(tmp_path / "empty.csv", []))
