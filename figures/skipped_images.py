"""Pictures of what gates do to single images: figures 13 and 14 of Dual Dynamic Inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from figures.look import ADAPTIVE, INK, PALE, sheet


class Sample(NamedTuple):
    """One image in the picture.

    Attributes:
        pixels: (h, w, 3) or (h, w, 1), uint8.
        name: of its class.
        mistaken: what it is taken for, None where that is right.
        note: what is written below it.
    """

    pixels: np.ndarray
    name: str
    mistaken: str | None
    note: str


def easy_hard_figure(groups: Mapping[str, Sequence[Sample]], title: str) -> Figure:
    """Images with the most and with the least saved, a group a row, those answered wrong framed (Fig. 13).

    Args:
        groups: by what they are.
    """
    columns = max(len(samples) for samples in groups.values())
    figure = sheet(0.6 + 2.1 * len(groups), title)
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for part, (name, samples) in zip(parts, groups.items(), strict=True):
        part.suptitle(name, x=0.012, ha="left", color=INK, fontsize=10)
        for axes, sample in zip(part.subplots(1, columns, squeeze=False)[0], samples, strict=False):
            _photograph(axes, sample)
        for axes in part.axes[len(samples) :]:
            axes.set_axis_off()
    return figure


def _photograph(axes: Axes, sample: Sample) -> None:
    axes.imshow(np.squeeze(sample.pixels), cmap="gray", vmin=0, vmax=255)
    wrong = sample.mistaken is not None
    text = _short(sample.name) + ("" if sample.mistaken is None else f"\nsaid: {_short(sample.mistaken)}")
    axes.set_title(text, fontsize=8, color=ADAPTIVE if wrong else INK)
    axes.set_xlabel(sample.note, fontsize=8, color=INK)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=ADAPTIVE if wrong else PALE, linewidth=2 if wrong else 0.6)


def _short(name: str) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= 10 else f"{name[:9].strip()}…"  # more would run into the next image's


class Feature(NamedTuple):
    """One image and its feature after a block.

    Attributes:
        sample: the image.
        off, on: (h, w), its feature averaged over channels, with every block run whole and with the gates.
        note: what the gates did.
    """

    sample: Sample
    off: np.ndarray
    on: np.ndarray
    note: str


def features_figure(features: Sequence[Feature], title: str) -> Figure:
    """Features with gates off and on, and their difference, an image a column (Fig. 14)."""
    names = ("image", "gates off", "gates on", "on minus off")
    figure = sheet(8.2, title)
    panels = figure.subplots(len(names), len(features), squeeze=False)
    maps = np.stack([[f.off, f.on] for f in features])
    widest = float(np.abs(maps[:, 1] - maps[:, 0]).max()) or 1.0
    shared: dict[str, Any] = {"vmin": float(maps.min()), "vmax": float(maps.max()), "cmap": "viridis"}
    apart: dict[str, Any] = {"vmin": -widest, "vmax": widest, "cmap": "RdBu_r"}
    for column, feature in zip(panels.T, features, strict=True):
        _photograph(column[0], feature.sample)
        for axes, values, look in zip(
            column[1:], (feature.off, feature.on, feature.on - feature.off), (shared, shared, apart), strict=True
        ):
            axes.imshow(values, **look)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=PALE, linewidth=0.6)
        column[-1].set_xlabel(feature.note, fontsize=8, color=INK)
    for axes, name in zip(panels[:, 0], names, strict=True):
        axes.set_ylabel(name, color=INK)
    for rows, look in ((panels[1:3], shared), (panels[3:], apart)):
        mappable = ScalarMappable(Normalize(look["vmin"], look["vmax"]), look["cmap"])
        bar = figure.colorbar(mappable, ax=rows.ravel().tolist(), fraction=0.03, aspect=30)
        bar.ax.tick_params(color=PALE, labelcolor=INK, labelsize=8)
        bar.outline.set_visible(False)
    return figure
