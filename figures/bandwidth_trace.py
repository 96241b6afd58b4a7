"""The picture of thresholds that follow a bandwidth which changes, over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from figures.look import ADAPTIVE, INK, MARKERS, dress, shades, sheet
from figures.tradeoff import LINES
from inference.simulation import Stream, averaged

LATENCY_S, SHARES_S = 1.0, 10.0  # windows
OTHERS = ("#cc79a7", "#56b4e9", "#882255", "#e69f00")  # streams besides the first; exits have the shades
FAR_APART = 20  # the largest average latency over the smallest, from which on the axis is logarithmic
MARKED = 12  # markers along a line


def simulation_figure(
    streams: Mapping[str, Stream], bound_ms: float, names_of_thresholds: Sequence[str], num_exits: int, title: str
) -> Figure:
    """Bandwidth, thresholds, latency and the share of each exit over time.

    Args:
        streams: by name, over the same bandwidths; thresholds and exits are those of the first.
        bound_ms: τ.
        names_of_thresholds: D of them, one kind for each early exit, then the next kind. A threshold has the colour of
            its exit; one that nobody reaches (infinity) is drawn at the top.
        num_exits: N.

    Raises:
        ValueError: no stream, or another number of names than the first has thresholds.
    """
    if not streams:
        raise ValueError("Expected at least one stream to draw, got none.")
    name, first = next(iter(streams.items()))
    if first.thresholds.shape[1] != len(names_of_thresholds):
        raise ValueError(
            f"Expected {first.thresholds.shape[1]} names of thresholds, as {name} has, got {len(names_of_thresholds)}."
        )
    figure = sheet(9.6, title)
    rows = figure.subplots(4, 1, sharex=True, height_ratios=[2, 3, 3, 3])
    _bandwidth(rows[0], first)
    _thresholds(rows[1], first, names_of_thresholds, num_exits)
    _latency(rows[2], streams, bound_ms)
    _shares(rows[3], first, num_exits)
    for axes, heading in zip(rows[1:], (name, None, name), strict=True):
        _legend(axes, heading if len(streams) > 1 else None, reverse=axes is rows[3])
    figure.align_ylabels(rows)
    return figure


def _legend(axes: Axes, heading: str | None, reverse: bool) -> None:
    if axes.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "alignment": "left"}
        look: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9}
        legend = axes.legend(title=heading, title_fontsize=9, reverse=reverse, **place, **look)
        legend.get_title().set_color(INK)


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bandwidth(axes: Axes, stream: Stream) -> None:
    axes.step(stream.arrival_s, stream.bandwidth, where="post", color=INK, linewidth=1.2)
    _logarithmic(axes, float(stream.bandwidth.min()), float(stream.bandwidth.max()))
    dress(axes, "", "bandwidth,\nMbit/s")


def _thresholds(axes: Axes, stream: Stream, names: Sequence[str], num_exits: int) -> None:
    values = stream.thresholds.numpy()
    top = float(values[np.isfinite(values)].max(initial=1))
    early = max(1, num_exits - 1)
    for i, name in enumerate(names):
        look = {"color": shades(num_exits)[i % early], "linestyle": LINES[i // early % len(LINES)]}
        axes.step(stream.arrival_s, np.minimum(values[:, i], top), where="post", linewidth=1.5, label=name, **look)
    axes.set_ylim(-0.04 * top, 1.04 * top)
    dress(axes, "", "thresholds")


def _latency(axes: Axes, streams: Mapping[str, Stream], bound_ms: float) -> None:
    drawn = []
    for i, (name, stream) in enumerate(streams.items()):
        begin, latency = averaged(stream.latency_ms, stream.arrival_s, LATENCY_S)
        drawn += [float(latency.min()), float(latency.max())]
        look: dict[str, Any] = {"color": OTHERS[(i - 1) % len(OTHERS)], "linewidth": 1.2}
        look |= {} if i else {"color": ADAPTIVE, "linewidth": 1.8, "zorder": 3}
        look |= {"marker": MARKERS[i % len(MARKERS)], "markevery": (3 * i, 1 + len(begin) // MARKED)}
        axes.plot(begin + LATENCY_S / 2, latency, label=name, markersize=5, **look)
    axes.axhline(bound_ms, color=INK, linewidth=1.1, linestyle="--", label=f"bound, {bound_ms:g} ms", zorder=4)
    low, high = min(drawn), max(drawn)
    if 0 < FAR_APART * low < high:
        _logarithmic(axes, low, high)
    else:
        axes.set_ylim(bottom=0)
    dress(axes, "", f"latency, ms,\naverage of {LATENCY_S:g} s")


def _shares(axes: Axes, stream: Stream, num_exits: int) -> None:
    exits = range(1, num_exits + 1)
    shares = [averaged(stream.exit == k, stream.arrival_s, SHARES_S) for k in exits]
    # until the image after the last one would come
    gap = (stream.arrival_s[1:2] - stream.arrival_s[:1]).sum().item() or LATENCY_S
    edges = [*shares[0][0].tolist(), stream.arrival_s[-1].item() + gap]
    heights = [[*(100 * share).tolist(), 100 * share[-1].item()] for _, share in shares]
    names = [f"exit {k}" for k in exits]
    axes.stackplot(edges, *heights, colors=shades(num_exits), labels=names, linewidth=0, step="post")
    axes.margins(0)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 100))
    dress(axes, "time, s", f"leaving at each exit, % of\nthe images of {SHARES_S:g} s")
