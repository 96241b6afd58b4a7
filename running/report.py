"""What a finished run prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from figures.look import save
from figures.run import curves_figure, exit_cells, exit_figure


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """The test metrics by exit: accuracy on all images, cost of leaving there, share that leaves there.

    The device ends after the last early exit; below the table is what it has to hold.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    columns, rows = exit_cells(metrics)
    for column in columns:
        table.add_column(column, justify="right")
    for i, row in enumerate(rows, start=2):
        table.add_row(*row, end_section=i == len(rows))
    notes = []
    if (saving := metrics.get("test/saving")) is not None:
        skipped, closed = metrics["test/skip_ratio"], metrics.get("test/closed_ratio", 0.0)
        notes.append(
            f"Without early heads the gates save {saving:.1%} of the plain backbone's MACs: {skipped:.1%} of the "
            f"blocks are skipped, {closed:.1%} of the channels of the others closed."
        )
    if (held := metrics.get("test/device_bytes")) is not None:
        notes.append(f"The device holds {held / 1e3:,.1f} kB.")
    table.caption = "\n".join(notes) or None
    return table


def write_figures(metrics: Mapping[str, float], folder: Path, cfg: DictConfig) -> None:
    """``figures/exits.png``: what each exit achieves and costs. ``figures/curves.png``: the accuracies in training."""
    title = f"{cfg.backbone.name}, {cfg.method.name}, {cfg.dataset.name}"
    save(exit_figure(metrics, title), folder / "figures" / "exits.png")
    with (folder / "metrics.csv").open() as file:
        trained = "train/loss" in next(file)
    if trained:
        save(curves_figure(folder / "metrics.csv"), folder / "figures" / "curves.png")
