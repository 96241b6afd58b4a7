"""The picture of a sweep: accuracy against cost, a point a job."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from figures.look import MARKERS, PALE, shades


def sweep_figure(jobs: pd.DataFrame, keys: Sequence[str], title: str) -> Figure:
    """Accuracy against MACs of the finished jobs; those that differ in their seed alone share colour and marker.

    Where there are several seeds, the mean stands over the jobs with a bar of one standard deviation each way.

    Args:
        jobs: with ``test/acc`` and ``test/macs``; see ``read_jobs``.
        keys: the overrides in which the jobs differ.
    """
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    groups = [key for key in keys if key != "seed"]
    done = jobs.dropna(subset=["test/acc", "test/macs"])
    parts = list(done.groupby(groups, sort=False, dropna=False)) if groups else [((), done)]
    for i, ((values, part), shade) in enumerate(zip(parts, shades(len(parts)), strict=True)):
        look = {"color": shade, "marker": MARKERS[i % len(MARKERS)]}
        macs, accuracy = part["test/macs"] / 1e6, 100 * part["test/acc"]
        label = ", ".join(map(str, values)) or "all"
        if len(part) > 1:
            axes.scatter(macs, accuracy, s=16, alpha=0.5, linewidths=0, **look)
            spread = {"xerr": macs.std(), "yerr": accuracy.std(), "elinewidth": 1, "capsize": 2}
            axes.errorbar(macs.mean(), accuracy.mean(), **spread, linestyle="", markersize=8, label=label, **look)
        else:
            axes.scatter(macs, accuracy, s=64, label=label, **look)
    axes.set(xlabel="MACs per image, millions", ylabel="test accuracy, %", title=title)
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if groups:
        figure.legend(loc="outside right upper", frameon=False, title=", ".join(groups))
    return figure
