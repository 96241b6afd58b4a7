"""Pictures of a run: accuracy against cost, where images leave, and the curves of its training."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from storage.files import written_aside

ADAPTIVE = "#d55e00"  # vermilion, told from every shade of viridis by the colour-blind too
MARKERS = "osD^vPX"
INK, PALE = "#333333", "#d9d9d9"
OUTLINE = [withStroke(linewidth=2.5, foreground="white")]
Point = tuple[float, float]


class ExitRow(NamedTuple):
    """One line of a run's result: ``exit`` (its number, or ``adaptive``), accuracy, MACs per image, share of images."""

    exit: str
    accuracy: float
    macs: float
    share: float


def exit_rows(metrics: Mapping[str, float]) -> list[ExitRow]:
    """The test metrics by exit, the last row under the run's operating point.

    Args:
        metrics: flat, ``test/exit_k/acc``, ``test/exit_k/macs``, ``test/exit_k/fraction``, ``test/acc``, ``test/macs``.

    Raises:
        ValueError: no exit among the metrics.
    """
    exits = sorted(int(found[1]) for name in metrics if (found := re.fullmatch(r"test/exit_(\d+)/acc", name)))
    if not exits:
        raise ValueError(f"Expected test/exit_1/acc among the metrics, got {sorted(metrics) or 'none'}.")
    rows = [ExitRow(str(k), *(metrics[f"test/exit_{k}/{name}"] for name in ("acc", "macs", "fraction"))) for k in exits]
    return [*rows, ExitRow("adaptive", metrics["test/acc"], metrics["test/macs"], 1.0)]


def exit_figure(metrics: Mapping[str, float], title: str) -> Figure:
    """Accuracy against MACs of every exit and of the adaptive operating point; beside it the share leaving where.

    Args:
        metrics: what ``exit_rows`` takes.
    """
    *exits, adaptive = exit_rows(metrics)
    figure = _sheet(4.4)
    figure.suptitle(title, x=0.012, ha="left", color=INK, fontweight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = shades(len(exits))
    unit, name = (1e9, "G") if adaptive.macs >= 1e9 else (1e6, "M")
    points = [(row.macs / unit, 100 * row.accuracy) for row in (*exits, adaptive)]
    left.plot(*zip(*points[:-1], strict=True), color=PALE, zorder=1)
    left.scatter(*zip(*points[:-1], strict=True), s=62, c=colours, edgecolors="white", zorder=2)
    texts = [f"exit {row.exit}" for row in exits]
    reached = f"{points[-1][1]:.1f} %, {points[-1][0]:.3g} {name}"
    if len(exits) > 1:
        left.scatter(*points[-1], s=190, marker="*", c=ADAPTIVE, edgecolors="white", zorder=3)
        texts.append(f"adaptive\n{reached}")
    else:
        texts[0] += f"\n{reached}"
    left.margins(0.12)
    _dress(left, f"MACs per image, {name}", "accuracy on all test images, %")
    _shares(right, exits, colours)
    figure.draw_without_rendering()  # the layout must stand before labels can be placed by their size on paper
    place_labels(left, points[: len(texts)], texts, [*[INK] * len(exits), ADAPTIVE][: len(texts)])
    return figure


def _sheet(height: float) -> Figure:
    figure = Figure(figsize=(9.6, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    return figure


def _shares(axes: Axes, exits: Sequence[ExitRow], colours: Sequence[Any]) -> None:
    places = range(len(exits))
    bars = axes.bar(places, [100 * row.share for row in exits], color=colours, width=0.7)
    axes.set_xticks(places, [row.exit for row in exits])
    axes.set_xlim(-0.75, len(exits) - 0.25)
    axes.bar_label(bars, fmt="%.1f", padding=2, color=INK)
    axes.margins(y=0.1)
    _dress(axes, "exit", "share of the test images leaving there, %")


def shades(count: int) -> list[Any]:
    """RGBA of so many exits or groups, dark to light, legible to the colour-blind and in grey."""
    viridis = matplotlib.colormaps["viridis"]
    return [viridis(0.9 * k / max(1, count - 1)) for k in range(count)]


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=PALE, labelcolor=INK)


def place_labels(axes: Axes, points: Sequence[Point], texts: Sequence[str], colours: Sequence[str]) -> list[Bbox]:
    """Writes each text near its point (data coordinates), clear of the points and of each other where there is room.

    Returns:
        The boxes of the texts, in pixels.
    """
    scale = axes.figure.dpi / 72
    centres = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    boxes: list[Bbox] = []
    for i, (point, text, colour) in enumerate(zip(points, texts, colours, strict=True)):
        # further from another point than from its own, so that a reader knows whose name it is
        near = [_box(centre, *[(9 if j == i else 26) * scale] * 2) for j, centre in enumerate(centres)]
        lines = text.split("\n")
        size = (5.6 * max(map(len, lines)) * scale, 12.5 * len(lines) * scale)
        shift, far = _free_place(centres[i], size, 8 * scale, [*near, *boxes], axes.bbox)
        boxes.append(_box((centres[i][0] + shift[0], centres[i][1] + shift[1]), *size))
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6} if far else None
        axes.annotate(
            text, point, (shift[0] / scale, shift[1] / scale), "data", textcoords="offset points", ha="center",
            va="center", color=colour, fontsize=9, arrowprops=leader, path_effects=OUTLINE, annotation_clip=False,
        )  # fmt: skip
    return boxes


def _free_place(centre: Point, size: Point, gap: float, taken: Sequence[Bbox], frame: Bbox) -> tuple[Point, bool]:
    """Where a text of this size, in pixels, is least in the way: its shift from the centre, and if that is far."""
    options = []
    for far, angle in itertools.product((1, 1.7, 2.6, 3.6, 4.8), (90, 45, 135, -45, -90, -135, 0, 180)):
        x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        shift = (x * (size[0] / 2 + far * gap), y * (size[1] / 2 + far * gap))
        box = _box((centre[0] + shift[0], centre[1] + shift[1]), *size)
        hidden = box.width * box.height - _shared(box, frame)
        options.append((sum(_shared(box, other) for other in taken) + hidden, shift, far > 1))
    return min(options, key=lambda option: option[0])[1:]


def _box(centre: Point, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)


def _shared(box: Bbox, other: Bbox) -> float:
    part = Bbox.intersection(box, other)
    return 0.0 if part is None else part.width * part.height


def curves_figure(csv_path: str | Path) -> Figure:
    """Validation accuracy of every exit, and the training loss, over the run's steps, its phases shaded.

    Args:
        csv_path: ``metrics.csv`` of a run directory.

    Raises:
        ValueError: the file holds no row.
    """
    with Path(csv_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"Expected {csv_path} to hold the metrics of a run, got no row.")
    names = {int(m[1]): m[0] for name in rows[0] if (m := re.fullmatch(r"val/exit_(\d+)/acc", name))}
    figure = _sheet(6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (upper, lower):
        _shade_phases(axes, rows, named=axes is upper)
    for (k, name), colour in zip(sorted(names.items()), shades(len(names)), strict=True):
        _curve(upper, rows, name, 100, color=colour, label=f"exit {k}", marker=MARKERS[(k - 1) % len(MARKERS)])
    if len(names) > 1:
        _curve(upper, rows, "val/acc", 100, color=ADAPTIVE, linestyle="--", label="adaptive", marker="*", markersize=7)
    _curve(lower, rows, "train/loss", 1, color=INK, marker="o")
    _dress(upper, "", "accuracy on all validation images, %")
    _dress(lower, "step", "training loss")
    if names:
        figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
    return figure


def _curve(axes: Axes, rows: Sequence[Mapping[str, str]], name: str, scale: float, **look: Any) -> None:
    points = [(int(row["step"]), scale * float(row[name])) for row in rows if row.get(name)]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, **{"linewidth": 1.6, "markersize": 4, "markevery": max(1, len(points) // 30)} | look)


def _shade_phases(axes: Axes, rows: Sequence[Mapping[str, str]], named: bool) -> None:
    ends: dict[str, int] = {}
    for row in rows:
        ends[row["phase"]] = int(row["step"])
    start, whole = 0, max(1, *ends.values())
    for i, (phase, end) in enumerate(ends.items()):
        axes.axvspan(start, end, color=PALE, alpha=0.45 if i % 2 else 0.15, linewidth=0)
        if named:
            narrow = 90 * (end - start) / whole < len(phase)
            axes.text(
                (start + end) / 2, 1.01, phase, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                rotation=90 if narrow else 0, fontsize=9, color=INK,
            )  # fmt: skip
        start = end


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all."""
    with written_aside(path) as file:
        figure.savefig(file, format="png", dpi=150)
