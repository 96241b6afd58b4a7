"""Pictures of what runs can do: accuracy against cost or time, and where images leave along the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.look import INK, PALE, Point, dress, shades, sheet, stack_exits

# of the points that are chosen, in the order they come
CHOSEN = ("*", "D", "P", "X", "v")
FULL, ORACLES = "s", "o^"
LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


class RunCurve(NamedTuple):
    """One run in the picture; points are (cost, accuracy from 0 to 1).

    Attributes:
        label: names the run.
        front: the operating points that were best on the calibration split, by cost; none without early exits.
        series: those of the budgeted-batch protocol.
        chosen: single points by name.
        full: the backbone and its own head alone, with its gates where it has any.
        oracles: bounds by name.
        gated: whether it has gates.
    """

    label: str
    front: Sequence[Point]
    series: Sequence[Point]
    chosen: Mapping[str, Point]
    full: Point
    oracles: Mapping[str, Point]
    gated: bool = False


def tradeoff_figure(curves: Sequence[RunCurve], axis: str, title: str) -> Figure:
    """Accuracy against cost of all runs, on the test split.

    Args:
        axis: what the cost is, such as ``MACs``.
        title: with the data set and the split that the points were chosen on.
    """
    figure = sheet(5.4, title)
    axes = figure.subplots()
    unit, prefix = unit_of(max(curve.full[0] for curve in curves), axis)
    markers = {name: CHOSEN[i % len(CHOSEN)] for i, name in enumerate(_names(curves))}
    for i, (curve, colour) in enumerate(zip(curves, shades(len(curves)), strict=True)):
        _draw(axes, curve, {"color": colour, "linestyle": LINES[i % len(LINES)], "linewidth": 1.8}, unit, markers)
    dress(axes, f"{axis} per image{f', {prefix}' if prefix else ''}", "accuracy on all test images, %")
    axes.margins(0.04)
    figure.legend(handles=_legend(curves, markers), loc="outside right center", frameon=False, labelcolor=INK)
    return figure


def _names(curves: Sequence[RunCurve]) -> list[str]:
    return list(dict.fromkeys(name for curve in curves for name in curve.chosen))


def unit_of(largest: float, axis: str) -> tuple[float, str]:
    """The unit that numbers up to ``largest`` are shown in, and its prefix; none where the axis names its own."""
    if " in " in axis:
        return 1.0, ""
    return next((unit, prefix) for unit, prefix in UNITS if largest >= unit or unit == 1)


def _draw(axes: Axes, curve: RunCurve, line: Mapping[str, Any], unit: float, markers: Mapping[str, str]) -> None:
    colour = line["color"]

    def scaled(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [x / unit for x, _ in points], [100 * y for _, y in points]

    axes.plot(*scaled(curve.front), **line, zorder=2)
    axes.plot(*scaled(curve.series), color=colour, linewidth=0.9, linestyle=":", marker=".", markersize=5, zorder=2)
    for name, point in curve.chosen.items():
        size = 190 if markers[name] == "*" else 70
        axes.scatter(*scaled([point]), s=size, marker=markers[name], color=colour, edgecolors="white", zorder=4)
    for marker, point in zip((FULL, *ORACLES), (curve.full, *curve.oracles.values()), strict=False):
        axes.scatter(*scaled([point]), s=70, marker=marker, facecolors="white", edgecolors=[colour], zorder=3)


def _legend(curves: Sequence[RunCurve], markers: Mapping[str, str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, linewidth=1.8, linestyle=LINES[i % len(LINES)], label=curve.label)
        if curve.front
        else Line2D([], [], color=colour, marker=FULL, markerfacecolor="white", linestyle="", label=curve.label)
        for i, (curve, colour) in enumerate(zip(curves, shades(len(curves)), strict=True))
    ]
    look: dict[str, Any] = {"color": INK, "markeredgecolor": "white", "linestyle": ""}
    handles += [
        Line2D([], [], marker=marker, markersize=13 if marker == "*" else 9, label=name, **look)
        for name, marker in markers.items()
    ]
    if any(curve.series for curve in curves):
        handles.append(Line2D([], [], color=INK, linestyle=":", marker=".", label="budgeted batch"))
    hollow: dict[str, Any] = {"color": INK, "markerfacecolor": "white", "linestyle": "", "markersize": 8}
    alone = {curve.gated: "last exit, gated" if curve.gated else "full network alone" for curve in curves}
    handles.append(Line2D([], [], marker=FULL, label=", or ".join(alone[gated] for gated in sorted(alone)), **hollow))
    names = dict.fromkeys(name for curve in curves for name in curve.oracles)
    return handles + [Line2D([], [], marker=m, label=n, **hollow) for m, n in zip(ORACLES, names, strict=False)]


def shares_figure(costs: Sequence[float], shares: Sequence[Sequence[float]], axis: str, title: str) -> Figure:
    """Where images leave along the front of one run: the share of each exit, stacked.

    Args:
        costs: of the points, rising.
        shares: of the images, a row a point, a column an exit.
        axis: what the cost is.
    """
    figure = sheet(4.4, title)
    axes = figure.subplots()
    unit, prefix = unit_of(max(costs), axis)
    columns = [[100 * share for share in column] for column in zip(*shares, strict=True)]
    stack_exits(axes, [cost / unit for cost in costs], columns)
    dress(
        axes,
        f"{axis} per image of the operating point{f', {prefix}' if prefix else ''}",
        "share of the test images leaving there, %",
    )
    return figure


def latency_figure(times: Mapping[int, Sequence[Point]], full: Mapping[int, Point], title: str) -> Figure:
    """Accuracy against measured time, one panel a batch size.

    Args:
        times: by batch size, (time as a share of the full network's, accuracy) of the points of the front.
        full: by batch size, (milliseconds an image, accuracy) of the backbone and its own head alone.
    """
    figure = sheet(4.4, title)
    panels = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
    for i, (axes, (size, points)) in enumerate(zip(panels, times.items(), strict=True)):
        milliseconds, accuracy = full[size]
        axes.axvline(1, color=PALE, linewidth=1, zorder=0)
        axes.plot([x for x, _ in points], [100 * y for _, y in points], color=shades(2)[0], marker=".", label="front")
        alone: dict[str, Any] = {"s": 70, "marker": FULL, "facecolors": "white", "edgecolors": INK, "zorder": 3}
        axes.scatter(1, 100 * accuracy, label="full network alone", **alone)
        axes.set_xlim(left=0)
        label = f"time per image at batch {size}, full network = 1 ({milliseconds:.3g} ms)"
        dress(axes, label, "" if i else "accuracy on all test images, %")
    panels[-1].legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure
