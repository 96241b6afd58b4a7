"""Pictures of networks whose gates skip blocks and channels: figures 7, 9, 10, 12 and 15 of Dual Dynamic Inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.look import ADAPTIVE, INK, MARKERS, PALE, Point, dress, place_labels, shades, sheet
from figures.tradeoff import FULL, LINES, unit_of

ACCURACY = "accuracy on all test images, %"


class Ratios(NamedTuple):
    """Shares of the blocks, from 0 to 1.

    Attributes:
        blocks: of each, NaN where it is not known.
        average: of all.
    """

    blocks: Sequence[float]
    average: float


def skips_figure(skipped: Ratios | None, closed: Ratios | None, stages: Sequence[int], title: str) -> Figure:
    """How often each block is skipped, and how many of its channels are closed where it runs (Fig. 15).

    Args:
        skipped: share of the images that skip each block, None without layer gates.
        closed: share of its channels that are closed in images that run it, NaN where none does; None without
            channel gates.
        stages: number of blocks of each stage.
    """
    panels = [(skipped, "images that\nskip the block, %"), (closed, "its channels closed in\nimages that run it, %")]
    drawn = [(ratios, name) for ratios, name in panels if ratios is not None]
    figure = sheet(1.2 + 2.4 * len(drawn), title)
    rows = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for i, (axes, (ratios, name)) in enumerate(zip(rows, drawn, strict=True)):
        _bars(axes, ratios)
        _stages(axes, ratios, stages, named=i == 0)
        dress(axes, "block" if i == len(drawn) - 1 else "", name)
    handles = {text: handle for axes in rows for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=3, frameon=False, labelcolor=INK)
    return figure


def _bars(axes: Axes, ratios: Ratios) -> None:
    heights = 100 * np.asarray(ratios.blocks, dtype=float)
    places = np.arange(1, len(heights) + 1)
    axes.bar(places, heights, width=0.8, color=shades(3)[1])
    if len(unknown := places[np.isnan(heights)]):
        axes.scatter(unknown, np.full(len(unknown), 3), marker="x", s=20, color=INK, label="run for no image")
    if not np.isnan(mean := 100 * ratios.average):
        axes.axhline(mean, color=INK, linewidth=0.9, linestyle="--", zorder=1.5, label="average")
        across = axes.get_yaxis_transform()
        axes.text(1.005, mean, f"{mean:.1f} %", transform=across, va="center", fontsize=9, color=INK)
    axes.set_xticks(places[:: max(1, -(-len(heights) // 40))])
    axes.set_xlim(0.4, len(heights) + 0.6)
    axes.set_ylim(0, 109)


def _stages(axes: Axes, ratios: Ratios, stages: Sequence[int], named: bool) -> None:
    firsts = np.cumsum([0, *stages[:-1]])
    above = [9 if np.isnan(height) else 100 * height + 6 for height in np.asarray(ratios.blocks)[firsts]]
    axes.scatter(firsts + 1, above, marker="v", s=36, color=ADAPTIVE, label="first block of a stage", zorder=3)
    for i, (first, length) in enumerate(zip(firsts, stages, strict=True), start=1):
        if i > 1:
            axes.axvline(first + 0.5, color=PALE, linewidth=1, zorder=0)
        if named and len(stages) > 1:
            place, top = first + (length + 1) / 2, axes.get_xaxis_transform()
            axes.text(place, 1.03, f"stage {i}", transform=top, ha="center", fontsize=9, color=INK)


def strategies_figure(
    strategies: Mapping[str, Sequence[Point]], plain: Mapping[str, Point], axis: str, title: str
) -> Figure:
    """Accuracy against cost, a line a way to skip (figures 7, 9 and 10).

    Args:
        strategies: by name, (cost, accuracy from 0 to 1) of the runs.
        plain: the same of networks that skip nothing.
        axis: what the cost is.
    """
    unit, prefix = unit_of(max(x for points in (*strategies.values(), plain.values()) for x, _ in points), axis)
    figure = sheet(5.2, title)
    axes = figure.subplots()
    _lines(axes, strategies, unit)
    dress(axes, f"{axis} per image{f', {prefix}' if prefix else ''}", ACCURACY)
    _finish(figure, axes, _scaled(plain, unit))
    return figure


def resource_figure(lines: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """Accuracy against the energy saved, by what a run was trained to save (Fig. 12).

    Args:
        lines: by name, (share of the energy saved, accuracy), both from 0 to 1.
    """
    figure = sheet(4.8, title)
    axes = figure.subplots()
    _lines(axes, lines, 0.01)
    dress(axes, "energy saved of the plain backbone's, %", ACCURACY)
    _finish(figure, axes, {})
    return figure


def anytime_figure(
    exits: Sequence[Point],
    spent: Sequence[Point],
    limits: Sequence[Point],
    plain: Mapping[str, Point],
    axis: str,
    title: str,
) -> Figure:
    """What a network answers at any time: all images at one exit, and under hard budgets.

    Args:
        exits: (average cost, accuracy) of each exit.
        spent: the same under hard budgets.
        limits: (budget, accuracy) of these, empty where the axis is another than the budget's.
        plain: networks that skip nothing and have no exits, by name.
        axis: what the cost is.
    """
    unit, prefix = unit_of(max(x for x, _ in (*exits, *limits, *plain.values())), axis)
    figure = sheet(5.2, title)
    axes = figure.subplots()
    colours = shades(3)
    axes.plot(*_xy(spent, unit), color=colours[1], linewidth=1.6, label="hard budget, at its average cost")
    if limits:
        steps: dict[str, Any] = {"linestyle": "--", "drawstyle": "steps-post", "linewidth": 1.6}
        axes.plot(*_xy(limits, unit), color=colours[0], label="hard budget, at the budget itself", **steps)
    look: dict[str, Any] = {"color": ADAPTIVE, "marker": "o", "linestyle": "", "zorder": 3}
    axes.plot(*_xy(exits, unit), **look, label="all images at one exit")
    dress(axes, f"{axis} per image{f', {prefix}' if prefix else ''}", ACCURACY)
    named = {f"exit {k}": point for k, point in enumerate(exits, start=1)}
    _finish(figure, axes, _scaled(plain, unit), _scaled(named, unit))
    return figure


def _lines(axes: Axes, lines: Mapping[str, Sequence[Point]], unit: float) -> None:
    for i, ((name, points), colour) in enumerate(zip(lines.items(), shades(len(lines)), strict=True)):
        look: dict[str, Any] = {
            "color": colour,
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
        axes.plot(*_xy(sorted(points), unit), **look, linewidth=1.8, label=name)


def _finish(figure: Figure, axes: Axes, plain: Mapping[str, Point], named: Mapping[str, Point] | None = None) -> None:
    """The plain networks, the legend, and the names of single points."""
    if plain:
        look: dict[str, Any] = {"s": 70, "marker": FULL, "facecolors": "white", "edgecolors": INK, "zorder": 3}
        axes.scatter(*zip(*plain.values(), strict=True), **look, label="plain network")
    axes.margins(0.1)
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK)
    figure.draw_without_rendering()  # the layout must stand before labels can be placed by their size on paper
    texts = {**plain, **(named or {})}
    colours = [INK] * len(plain) + [ADAPTIVE] * len(named or {})
    place_labels(axes, list(texts.values()), list(texts), colours)


def _scaled(points: Mapping[str, Point], unit: float) -> dict[str, Point]:
    return {name: (x / unit, 100 * y) for name, (x, y) in points.items()}


def _xy(points: Sequence[Point], unit: float) -> tuple[list[float], list[float]]:
    return [x / unit for x, _ in points], [100 * y for _, y in points]
