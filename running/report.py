"""What a finished run prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from running.figures import curves_figure, exit_figure, save


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """The test metrics by exit: accuracy on all images, cost of leaving there, share that leaves there."""
    table = Table(title=title, title_justify="left")
    for column in ("exit", "accuracy", "MACs", "share"):
        table.add_column(column, justify="right")
    exits = sum(name.endswith("/acc") for name in metrics) - 1
    for k in range(1, exits + 1):
        row = [metrics[f"test/exit_{k}/{name}"] for name in ("acc", "macs", "fraction")]
        table.add_row(str(k), *_cells(*row), end_section=k == exits)
    table.add_row("adaptive", *_cells(metrics["test/acc"], metrics["test/macs"], 1.0))
    return table


def _cells(accuracy: float, macs: float, share: float) -> list[str]:
    return [f"{accuracy:.4f}", f"{macs / 1e6:.2f} M", f"{share:.1%}"]


def write_figures(metrics: Mapping[str, float], folder: Path, cfg: DictConfig) -> None:
    """``figures/exits.png``: what each exit achieves and costs. ``figures/curves.png``: the accuracies in training."""
    title = f"{cfg.backbone.name}, {cfg.method.name}, {cfg.dataset.name}"
    save(exit_figure(metrics, title), folder / "figures" / "exits.png")
    save(curves_figure(folder / "metrics.csv"), folder / "figures" / "curves.png")
