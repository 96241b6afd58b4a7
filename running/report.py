"""What a finished run prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from figures.look import save
from figures.run import curves_figure, exit_figure, exit_rows


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """The test metrics by exit: accuracy on all images, cost of leaving there, share that leaves there."""
    table = Table(title=title, title_justify="left")
    for column in ("exit", "accuracy", "MACs", "share"):
        table.add_column(column, justify="right")
    *exits, adaptive = exit_rows(metrics)
    for row in (*exits, adaptive):
        cells = (f"{row.accuracy:.4f}", f"{row.macs / 1e6:.2f} M", f"{row.share:.1%}")
        table.add_row(row.exit, *cells, end_section=row is exits[-1])
    return table


def write_figures(metrics: Mapping[str, float], folder: Path, cfg: DictConfig) -> None:
    """``figures/exits.png``: what each exit achieves and costs. ``figures/curves.png``: the accuracies in training."""
    title = f"{cfg.backbone.name}, {cfg.method.name}, {cfg.dataset.name}"
    save(exit_figure(metrics, title), folder / "figures" / "exits.png")
    save(curves_figure(folder / "metrics.csv"), folder / "figures" / "curves.png")
