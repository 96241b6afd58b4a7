"""Pictures of single exits: how sure and how right they are, where they and the last exit disagree, and difficulty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.look import ADAPTIVE, INK, PALE, dress, sheet, stack_exits

COLUMNS = 4  # of a figure with a panel an exit
MOST_CLASSES, MOST_EXITS = 20, 6
RIGHT, WRONG = "#0072b2", ADAPTIVE  # blue and vermilion, told apart by the colour-blind


class ExitConfidence(NamedTuple):
    """Of one exit: the confidence of each sample, whether it was right, and what a reliability diagram needs.

    Attributes:
        confidence: (samples,), from 0 to 1.
        right: (samples,) bool.
        edges, accuracy: of the bins of confidence, (bins + 1,) and (bins,), NaN where there is no sample.
        errors: expected calibration error, and before a temperature where there was one.
    """

    confidence: np.ndarray
    right: np.ndarray
    edges: np.ndarray
    accuracy: np.ndarray
    errors: Sequence[float]


def confidence_figure(exits: Sequence[ExitConfidence], title: str) -> Figure:
    """For each exit a histogram of its confidence, right and wrong apart, and below it the reliability diagram."""
    columns = min(COLUMNS, len(exits))
    rows = -(-len(exits) // columns)
    figure = sheet(1 + 4.2 * rows, title)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for i, exit in enumerate(exits):
        row, column = divmod(i, columns)
        upper, lower = grid[2 * row, column], grid[2 * row + 1, column]
        _histogram(upper, exit, f"exit {i + 1}", first=column == 0)
        _reliability(lower, exit, first=column == 0)
    grid[0, 0].legend(frameon=False, labelcolor=INK, loc="best", fontsize=9)
    return figure


def _histogram(axes: Axes, exit: ExitConfidence, name: str, first: bool) -> None:
    axes.set_visible(True)
    parts = [exit.confidence[exit.right], exit.confidence[~exit.right]]
    weights = [np.full(len(part), 100 / len(exit.confidence)) for part in parts]
    axes.hist(
        parts, bins=list(exit.edges), weights=weights, stacked=True, color=[RIGHT, WRONG], label=["right", "wrong"]
    )
    axes.set_xlim(0, 1)
    axes.set_title(name, color=INK, fontsize=10)
    dress(axes, "", "share of the test images, %" if first else "")


def _reliability(axes: Axes, exit: ExitConfidence, first: bool) -> None:
    axes.set_visible(True)
    axes.bar(exit.edges[:-1], 100 * exit.accuracy, np.diff(exit.edges), align="edge", color=RIGHT, edgecolor="white")
    axes.plot([0, 1], [0, 100], color=INK, linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 100))
    after, *before = [100 * error for error in exit.errors]
    text = f"ECE {after:.1f} %" + (f"\nbefore {before[0]:.1f} %" if before else "")
    axes.text(0.05, 0.95, text, transform=axes.transAxes, va="top", color=INK, fontsize=9)
    dress(axes, "confidence", "accuracy in the bin, %" if first else "")


def disagreement_figure(overthought: np.ndarray, needed: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Per early exit and class: where it is right and the last exit wrong (overthinking), and the reverse.

    Args:
        overthought, needed: (N - 1, C), shares of the class's images. Of many classes those with the largest are
            shown, of many exits six.
        classes: names, C of them.
    """
    shown = np.unique(np.linspace(0, len(overthought) - 1, min(MOST_EXITS, len(overthought))).round().astype(int))
    order = np.argsort(-np.nan_to_num(overthought + needed).max(0), kind="stable")[:MOST_CLASSES]
    order = np.sort(order)[::-1] if len(classes) <= MOST_CLASSES else order[::-1]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = sheet(0.9 + rows * (0.9 + 0.24 * len(order)), title)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    places = np.arange(len(order))
    for k, axes in zip(shown, grid.flat, strict=False):
        axes.barh(places, 100 * overthought[k, order], color=WRONG, label="early right, last wrong (overthinking)")
        axes.barh(places, -100 * needed[k, order], color=RIGHT, label="early wrong, last right")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(places, [_short(classes[i]) for i in order])
        axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        axes.set_title(f"exit {k + 1}", color=INK, fontsize=10)
        dress(axes, "% of the class's test images", "")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=PALE, linewidth=0.6)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", frameon=False, labelcolor=INK, ncols=2)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def difficulty_figure(
    difficulty: np.ndarray, exit: np.ndarray, right: np.ndarray, full_right: np.ndarray, name: str, title: str
) -> Figure:
    """Accuracy and exit against what the data set knows of each image, in ten bins of equally many images.

    Args:
        difficulty, exit, right, full_right: (samples,): the number, where the image leaves (from 1), whether the answer
            is right, whether the last exit is.
        name: of the number.
    """
    figure = sheet(4.4, title)
    accuracies, places = figure.subplots(1, 2)
    bins = np.array_split(np.argsort(difficulty, kind="stable"), min(10, len(difficulty)))
    middle = [difficulty[rows].mean() for rows in bins]
    for values, look in (
        (full_right, {"color": INK, "linestyle": "--", "marker": "s", "markerfacecolor": "white"}),
        (right, {"color": ADAPTIVE, "marker": "o"}),
    ):
        label = "adaptive" if values is right else "full network alone"
        accuracies.plot(middle, [100 * values[rows].mean() for rows in bins], label=label, **look)
    accuracies.legend(frameon=False, labelcolor=INK, loc="lower left")
    dress(accuracies, name, "accuracy, %")
    exits = range(1, int(exit.max()) + 1)
    shares = [[100 * (exit[rows] == k).mean() for rows in bins] for k in exits]
    stack_exits(places, middle, shares)
    dress(places, name, "share of the images leaving there, %")
    return figure
