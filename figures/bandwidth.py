"""Latency and accuracy along the bandwidth: figure 10 of the Exit Predictor paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from figures.look import ADAPTIVE, INK, MARKERS, dress, shades, sheet

FAR = 4  # times as far below the best as the middle one is


class Series(NamedTuple):
    """A method along the bandwidths.

    Attributes:
        name: of the method.
        accuracy: from 0 to 1.
        latency: average ms an image.
        static: whether it does the same at every bandwidth.
        bound: whether it is what no thresholds can beat.
    """

    name: str
    accuracy: Sequence[float]
    latency: Sequence[float]
    static: bool
    bound: bool


def bandwidth_figure(mbps: Sequence[float], series: Sequence[Series], bound_ms: float, title: str) -> Figure:
    """Latency above, accuracy below, over the bandwidth in Mbit/s; the bound as a line.

    What falls far below the accuracy of all others leaves the picture, and its lowest point is written there.
    """
    figure = sheet(7.4, title, size=10)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.axhline(bound_ms, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    upper.text(mbps[-1], bound_ms, f"τ = {bound_ms:g} ms ", ha="right", va="bottom", color=INK, fontsize=9)
    every = max(1, len(mbps) // 10)
    looks = _looks(series)
    for i, (one, look) in enumerate(zip(series, looks, strict=True)):
        look |= {"markevery": (i * every // len(series), every), "markersize": 5}
        upper.plot(mbps, one.latency, **look, label=one.name)
        lower.plot(mbps, [100 * value for value in one.accuracy], **look)
    _plain_log(upper, [value for one in series for value in one.latency])
    upper.set_xscale("log")
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    dress(upper, "", "average latency, ms")
    dress(lower, "bandwidth, Mbit/s", "accuracy on all test images, %")
    _close_up(lower, mbps, series, [look["color"] for look in looks])
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK)
    return figure


def _close_up(axes: Axes, mbps: Sequence[float], series: Sequence[Series], colours: Sequence[str]) -> None:
    """Ends the axis below the lowest accuracy that is not far below the others'."""
    lows = sorted(min(one.accuracy) for one in series)
    high = max(max(one.accuracy) for one in series)
    shown = next(low for low in lows if high - low <= FAR * max(high - lows[len(lows) // 2], 0.002))
    if shown == lows[0]:
        return
    axes.set_ylim(bottom=100 * (shown - 0.15 * (high - shown)))
    below = [(one, colour) for one, colour in zip(series, colours, strict=True) if min(one.accuracy) < shown]
    for i, (one, colour) in enumerate(below):
        lowest = min(one.accuracy)
        place = (mbps[len(mbps) // 3], 0.03 + 0.08 * i)
        text = f"{one.name}: down to {100 * lowest:.1f} % at {mbps[list(one.accuracy).index(lowest)]:.2g} Mbit/s"
        axes.text(*place, text, transform=axes.get_xaxis_transform(), color=colour, fontsize=9)


def _plain_log(axes: Axes, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    # powers of ten alone would leave the axis of a decade without numbers
    steps = (1, 2, 3, 5, 7) if max(values) < 20 * min(values) else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _looks(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Static methods in grey and dashed, the others in colour, the last of these, the paper's own, in vermilion."""
    coloured = [one for one in series if not one.static and not one.bound]
    colours = {one.name: colour for one, colour in zip(coloured, shades(len(coloured)), strict=True)}
    if coloured:
        colours[coloured[-1].name] = ADAPTIVE
    looks: list[dict[str, Any]] = []
    greys = iter(("#777777", "#aaaaaa", "#444444") * len(series))
    for one, marker in zip(series, MARKERS * len(series), strict=False):
        if one.bound:
            looks.append({"color": INK, "linestyle": ":", "linewidth": 1.6})
        elif one.static:
            looks.append({"color": next(greys), "linestyle": "--", "linewidth": 1.2, "marker": marker})
        else:
            looks.append({"color": colours[one.name], "linewidth": 1.8, "marker": marker})
    return looks
