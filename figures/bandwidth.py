"""Latency and accuracy along the bandwidth: figure 10 of the Exit Predictor paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from figures.look import ADAPTIVE, INK, MARKERS, dress, shades, sheet


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
    """Latency above, accuracy below, over the bandwidth in Mbit/s; the bound as a line."""
    figure = sheet(7.4, title, size=10)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.axhline(bound_ms, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    upper.text(mbps[-1], bound_ms, f"τ = {bound_ms:g} ms ", ha="right", va="bottom", color=INK, fontsize=9)
    every = max(1, len(mbps) // 10)
    for i, (one, look) in enumerate(zip(series, _looks(series), strict=True)):
        look |= {"markevery": (i * every // len(series), every), "markersize": 5}
        upper.plot(mbps, one.latency, **look, label=one.name)
        lower.plot(mbps, [100 * value for value in one.accuracy], **look)
    _plain_log(upper)
    upper.set_xscale("log")
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    dress(upper, "", "average latency, ms")
    dress(lower, "bandwidth, Mbit/s", "accuracy on all test images, %")
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK)
    return figure


def _plain_log(axes: Axes) -> None:
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else ""))


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
