"""Pictures of hybrid networks' designs: figures 4 and 5 of the hybrid-network paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.look import INK, MARKERS, Point, dress, place_labels, shades, sheet

FULL = "s"


class Spot(NamedTuple):
    """One design in the picture: its name, energy, accuracy from 0 to 1."""

    name: str
    energy: float
    accuracy: float


class Along(NamedTuple):
    """One design along the edge: convolutions there, accuracy and share leaving early, both from 0 to 1."""

    edge: int
    accuracy: float
    share: float


def energy_figure(
    with_exit: Mapping[str, Sequence[Spot]],
    without: Mapping[str, Sequence[Spot]],
    others: Sequence[Spot],
    axis: str,
    title: str,
) -> Figure:
    """Accuracy against energy (Fig. 4): a series for each precision, with an early exit solid and without dashed.

    Args:
        with_exit, without: the designs of each precision, by edge.
        others: single points, such as the network in full precision.
        axis: what the energy is.
    """
    figure = sheet(5.2, title)
    axes = figure.subplots()
    names = list(dict.fromkeys([*with_exit, *without]))
    spots: list[tuple[Spot, Any]] = []
    for i, (name, colour) in enumerate(zip(names, shades(len(names)), strict=True)):
        look: dict[str, Any] = {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
        _series(axes, with_exit.get(name, ()), {**look, "linewidth": 1.8, "label": f"{name}, with exit"})
        hollow = {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2, "label": f"{name}, without"}
        _series(axes, without.get(name, ()), {**look, **hollow})
        spots += [(spot, colour) for spot in (*with_exit.get(name, ()), *without.get(name, ()))]
    for spot in others:
        axes.scatter(*_xy([spot]), s=70, marker=FULL, facecolors="white", edgecolors=INK, zorder=3)
        spots.append((spot, INK))
    axes.set_xlim(left=0)
    axes.margins(0.1)
    dress(axes, axis, "accuracy on all test images, %")
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK)
    figure.draw_without_rendering()  # the layout must stand before labels can be placed by their size on paper
    points: list[Point] = [(spot.energy, 100 * spot.accuracy) for spot, _ in spots]
    place_labels(axes, points, [spot.name for spot, _ in spots], [colour for _, colour in spots])
    return figure


def _series(axes: Axes, spots: Sequence[Spot], look: Mapping[str, Any]) -> None:
    if spots:
        axes.plot(*_xy(spots), **look)


def _xy(spots: Sequence[Spot]) -> tuple[list[float], list[float]]:
    return [spot.energy for spot in spots], [100 * spot.accuracy for spot in spots]


def edge_figure(series: Mapping[str, Sequence[Along]], title: str) -> Figure:
    """Accuracy, and the share of images that leave at the edge, against the convolutions there (Fig. 5).

    Args:
        series: by precision.
    """
    figure = sheet(4.4, title)
    panels = figure.subplots(1, 2)
    edges = sorted({place.edge for places in series.values() for place in places})
    for i, ((name, places), colour) in enumerate(zip(series.items(), shades(len(series)), strict=True)):
        look: dict[str, Any] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.8, "label": name}
        for axes, values in zip(panels, ([p.accuracy for p in places], [p.share for p in places]), strict=True):
            axes.plot([p.edge for p in places], [100 * value for value in values], **look)
    labels = ("accuracy on all test images, %", "share of the test images leaving at the edge, %")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xticks(edges)
        axes.margins(0.12)
        dress(axes, "convolutions at the edge", label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, labelcolor=INK)
    return figure
