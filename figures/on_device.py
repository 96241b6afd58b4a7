"""Pictures of what is computed on the device: figures 7, 8 and 9 of the Exit Predictor paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from figures.look import ADAPTIVE, INK, MARKERS, PALE, Point, dress, place_labels, shades, sheet
from figures.tradeoff import unit_of

WARM = (ADAPTIVE, "#e69f00", "#cc79a7", "#882255")
BELOW = 0.01  # accuracy; how far below the others a pruned network is still drawn


class Line(NamedTuple):
    """A contender: its kind, its name, and (cost on the device, accuracy from 0 to 1) by the λ all exits share."""

    kind: str
    label: str
    points: Sequence[Point]


def sweep_figure(lines: Sequence[Line], plain: Mapping[str, float], axis: str, title: str) -> Figure:
    """Accuracy against the cost on the device, λ rising along each line (figures 7 and 9).

    A pruned network that is worse than all others at every λ is left out of the frame, and said so.

    Args:
        plain: accuracy of networks without early exits, by name.
        axis: what the cost is.
    """
    figure = sheet(5.2, title)
    axes = figure.subplots()
    unit, prefix = unit_of(max(x for line in lines for x, _ in line.points), axis)
    shown = [line for line in lines if line.kind != "pruned"] or lines
    floor = min(y for line in shown for _, y in line.points) - BELOW
    for line, look in zip(lines, _looks(lines), strict=True):
        x, y = [x / unit for x, _ in line.points], [100 * y for _, y in line.points]
        if max(y) < 100 * floor:
            axes.plot([], [], label=f"{line.label} (at most {max(y):.0f} %)", **look)
        else:
            axes.plot(x, y, label=line.label, **look)
    for name, accuracy in plain.items():
        axes.axhline(100 * accuracy, color=INK, linewidth=1, linestyle=":", label=name)
    axes.set_ylim(bottom=100 * floor)
    dress(axes, f"{axis}, per image{f', {prefix}' if prefix else ''}", "accuracy on all test images, %")
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK)
    return figure


def _looks(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Early exits alone and with foresight dark, predictors in warm colours, pruned networks in shades."""
    cool = iter(shades(2 + sum(line.kind == "pruned" for line in lines))[1:])
    guided, found = 0, []
    for i, line in enumerate(lines):
        look: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.5}
        if line.kind == "pruned":
            look |= {"color": next(cool), "linestyle": "--"}
        elif line.kind == "EE+EP":
            look |= {"color": WARM[guided % len(WARM)], "zorder": 3}
            guided += 1
        else:
            look |= {"color": INK, "linestyle": "-" if line.kind == "EE" else "-."}
            look |= {} if line.kind == "EE" else {"markerfacecolor": "white"}
        found.append(look)
    return found


def ratios_figure(
    points: Mapping[str, Point], pruned: Mapping[str, Mapping[float, Point]], axis: str, title: str
) -> Figure:
    """Accuracy against the cost on the device at one λ, the pruned networks by their ratio (figure 8).

    Args:
        points: the other contenders by name.
        pruned: series by name, each by the ratio of filters removed.
        axis: what the cost is.
    """
    figure = sheet(5.0, title)
    axes = figure.subplots()
    series = {name: dict(sorted(ratios.items())) for name, ratios in pruned.items() if ratios}
    everything = [*points.values(), *(point for ratios in series.values() for point in ratios.values())]
    unit, prefix = unit_of(max(x for x, _ in everything), axis)
    named = [(name, point, ADAPTIVE if name.startswith("EE + EP") else INK) for name, point in points.items()]
    for (name, ratios), colour in zip(series.items(), ("#31688e", "#35b779"), strict=False):
        line = [*([points["EE"]] if "EE" in points else []), *ratios.values()]
        axes.plot(*_scaled(line, unit), color=colour, linewidth=1, label=name, zorder=1)
        named += [(f"{100 * ratio:.3g} %", point, colour) for ratio, point in ratios.items()]
    for name, point, colour in named:
        (x,), (y,) = _scaled([point], unit)
        axes.scatter(x, y, s=60, zorder=2, facecolors="white" if "oracle" in name else colour, edgecolors=colour)
    dress(axes, f"{axis}, per image{f', {prefix}' if prefix else ''}", "accuracy on all test images, %")
    axes.margins(0.1)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.legend(loc="lower right", frameon=False, labelcolor=INK)
    figure.draw_without_rendering()  # the layout must stand before labels can be placed by their size on paper
    names, places, colours = zip(*named, strict=True)
    place_labels(axes, list(zip(*_scaled(places, unit), strict=True)), names, colours)
    return figure


def _scaled(points: Sequence[Point], unit: float) -> tuple[list[float], list[float]]:
    return [x / unit for x, _ in points], [100 * y for _, y in points]
