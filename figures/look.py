"""What all pictures share: colours, axes, labels that keep clear of each other, and the file they end in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def sheet(height: float, title: str = "", size: float = 11) -> Figure:
    """An empty figure, 9.6 inches wide and so many high, with a title of this font size."""
    figure = Figure(figsize=(9.6, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    if title:
        figure.suptitle(title, x=0.012, ha="left", color=INK, fontweight="bold", fontsize=size)
    return figure


def stack_exits(axes: Axes, x: Sequence[float], shares: Sequence[Sequence[float]]) -> None:
    """Shares of the exits over ``x``, a sequence an exit, stacked, with a legend beside."""
    names = [f"exit {k}" for k in range(1, len(shares) + 1)]
    axes.stackplot(x, *shares, colors=shades(len(shares)), labels=names, linewidth=0)
    axes.margins(0)
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside right center", frameon=False, labelcolor=INK, reverse=True)


def shades(count: int) -> list[Any]:
    """RGBA of so many exits or groups, dark to light, legible to the colour-blind and in grey."""
    viridis = matplotlib.colormaps["viridis"]
    return [viridis(0.9 * k / max(1, count - 1)) for k in range(count)]


def dress(axes: Axes, x: str, y: str) -> None:
    """Names the axes and makes what is not data pale."""
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


def save(figure: Figure, path: Path) -> None:
    """Writes the figure, whole or not at all, in the format of the suffix: PNG, or SVG that keeps its text."""
    with written_aside(path) as file, matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format=path.suffix[1:], dpi=150)
