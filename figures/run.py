"""Pictures of a run: accuracy against cost, where images leave, and the curves of its training."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.look import ADAPTIVE, INK, MARKERS, PALE, dress, place_labels, shades, sheet


class ExitRow(NamedTuple):
    """One line of a run's result.

    Attributes:
        exit: its number, or ``adaptive``.
        accuracy: from 0 to 1.
        macs, device, server: MACs per image, in all, before and behind the cut.
        share: of the images.
        energy_uj: µJ per image, None where that is not known.
    """

    exit: str
    accuracy: float
    macs: float
    device: float
    server: float
    share: float
    energy_uj: float | None = None


def exit_rows(metrics: Mapping[str, float]) -> list[ExitRow]:
    """The test metrics by exit, the last row under the run's operating point.

    Args:
        metrics: flat, ``test/exit_k/acc``, ``test/exit_k/macs``, ``test/exit_k/fraction``, ``test/acc``, ``test/macs``;
            all is the device's where they do not say.

    Raises:
        ValueError: no exit among the metrics.
    """
    exits = sorted(int(found[1]) for name in metrics if (found := re.fullmatch(r"test/exit_(\d+)/acc", name)))
    if not exits:
        raise ValueError(f"Expected test/exit_1/acc among the metrics, got {sorted(metrics) or 'none'}.")
    rows = [_row(str(k), f"test/exit_{k}/", metrics, metrics[f"test/exit_{k}/fraction"]) for k in exits]
    return [*rows, _row("adaptive", "test/", metrics, 1.0)]


def _row(exit: str, prefix: str, metrics: Mapping[str, float], share: float) -> ExitRow:
    macs = metrics[f"{prefix}macs"]
    device = metrics.get(f"{prefix}device_macs", macs)
    energy = metrics.get(f"{prefix}energy_uj")
    return ExitRow(exit, metrics[f"{prefix}acc"], macs, device, macs - device, share, energy)


def exit_cells(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """What ``exit_rows`` gives as a table in words: its columns and rows, energy where it is known."""
    rows = exit_rows(metrics)
    powered = rows[-1].energy_uj is not None
    cells = [
        [
            row.exit,
            f"{row.accuracy:.4f}",
            *(f"{count / 1e6:.2f} M" for count in (row.macs, row.device, row.server)),
            *([] if row.energy_uj is None else [f"{row.energy_uj:.1f} µJ"]),
            f"{row.share:.1%}",
        ]
        for row in rows
    ]
    return ["exit", "accuracy", "MACs", "on device", "on server", *["energy"] * powered, "share"], cells


def exit_figure(metrics: Mapping[str, float], title: str) -> Figure:
    """Accuracy against MACs of every exit and of the adaptive operating point; beside it the share leaving where.

    Args:
        metrics: what ``exit_rows`` takes.
    """
    *exits, adaptive = exit_rows(metrics)
    figure = sheet(4.4, title, size=12)
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
    dress(left, f"MACs per image, {name}", "accuracy on all test images, %")
    _shares(right, exits, colours)
    figure.draw_without_rendering()  # the layout must stand before labels can be placed by their size on paper
    place_labels(left, points[: len(texts)], texts, [*[INK] * len(exits), ADAPTIVE][: len(texts)])
    return figure


def _shares(axes: Axes, exits: Sequence[ExitRow], colours: Sequence[Any]) -> None:
    places = range(len(exits))
    bars = axes.bar(places, [100 * row.share for row in exits], color=colours, width=0.7)
    axes.set_xticks(places, [row.exit for row in exits])
    axes.set_xlim(-0.75, len(exits) - 0.25)
    axes.bar_label(bars, fmt="%.1f", padding=2, color=INK)
    axes.margins(y=0.1)
    dress(axes, "exit", "share of the test images leaving there, %")


def curves_figure(csv_path: str | Path) -> Figure:
    """Validation accuracy of every exit, and the training loss, over the run's steps, its phases shaded.

    Args:
        csv_path: ``metrics.csv`` of a run directory.

    Raises:
        ValueError: the file holds no row.
    """
    rows = _rows(csv_path)
    names = {int(m[1]): m[0] for name in rows[0] if (m := re.fullmatch(r"val/exit_(\d+)/acc", name))}
    figure = sheet(6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (upper, lower):
        shade_phases(axes, rows, named=axes is upper)
    for (k, name), colour in zip(sorted(names.items()), shades(len(names)), strict=True):
        draw_column(upper, rows, name, 100, color=colour, label=f"exit {k}", marker=MARKERS[(k - 1) % len(MARKERS)])
    if len(names) > 1:
        look: dict[str, Any] = {"color": ADAPTIVE, "linestyle": "--", "marker": "*", "markersize": 7}
        draw_column(upper, rows, "val/acc", 100, label="adaptive", **look)
    draw_column(lower, rows, "train/loss", 1, color=INK, marker="o")
    dress(upper, "", "accuracy on all validation images, %")
    dress(lower, "step", "training loss")
    if names:
        figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
    return figure


def _rows(csv_path: str | Path) -> list[dict[str, str]]:
    with Path(csv_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"Expected {csv_path} to hold the metrics of a run, got no row.")
    return rows


def saving_figure(csv_path: str | Path) -> Figure:
    """What gates save in the course of training, over the accuracy that this leaves, its phases shaded.

    Args:
        csv_path: ``metrics.csv`` of a run directory.

    Raises:
        ValueError: the file holds no row.
    """
    rows = _rows(csv_path)
    last = max(int(m[1]) for name in rows[0] if (m := re.fullmatch(r"val/exit_(\d+)/acc", name)))
    figure = sheet(6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes in (upper, lower):
        shade_phases(axes, rows, named=axes is upper)
    draw_column(upper, rows, f"val/exit_{last}/acc", 100, color=INK, marker="o", label="last exit")
    if last > 1:
        draw_column(upper, rows, "val/acc", 100, color=ADAPTIVE, linestyle="--", label="adaptive", marker="*")
    names = {"val/saving": "MACs saved", "val/energy_saving": "energy saved", "val/skip_ratio": "blocks skipped",
             "val/closed_ratio": "channels closed"}  # fmt: skip
    lower.axhline(0, color=INK, linewidth=0.8)
    for name in ("saving", "energy_saving"):  # whichever was trained for
        label = f"{names[f'val/{name}']}, in training"
        draw_column(lower, rows, f"train/{name}", 100, color="#999999", linestyle=":", label=label)
    for (name, text), colour, marker in zip(names.items(), shades(len(names)), MARKERS, strict=False):
        draw_column(lower, rows, name, 100, color=colour, label=text, marker=marker)
    dress(upper, "", "accuracy on all validation images, %")
    dress(lower, "step", "on all validation images, %")
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
    return figure


def draw_column(axes: Axes, rows: Sequence[Mapping[str, str]], name: str, scale: float, **look: Any) -> None:
    """A column of ``metrics.csv`` over the steps, where it has values."""
    points = [(int(row["step"]), scale * float(row[name])) for row in rows if row.get(name)]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, **{"linewidth": 1.6, "markersize": 4, "markevery": max(1, len(points) // 30)} | look)


def shade_phases(axes: Axes, rows: Sequence[Mapping[str, str]], named: bool) -> None:
    """Shades the phases in turn, and writes their names above them."""
    ends: dict[str, int] = {}
    for row in rows:
        ends[row["phase"]] = int(row["step"])
    start, whole = 0, max(1, *ends.values())
    for i, (phase, end) in enumerate(ends.items()):
        axes.axvspan(start, end, color=PALE, alpha=0.45 if i % 2 else 0.15, linewidth=0)
        if named and end > start:  # a phase that chooses takes no step
            narrow = 90 * (end - start) / whole < len(phase)
            axes.text(
                (start + end) / 2, 1.01, phase, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                rotation=90 if narrow else 0, fontsize=9, color=INK,
            )  # fmt: skip
        start = end
