"""What a finished run prints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from figures.look import save
from figures.run import curves_figure, exit_cells, exit_figure, saving_figure
from figures.skipping import Ratios, skips_figure


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
    if metrics.get("test/sent_bytes"):
        last = max(int(found[1]) for name in metrics if (found := re.fullmatch(r"test/exit_(\d+)/sent_bytes", name)))
        notes.append(
            f"Crossing the cut takes {metrics[f'test/exit_{last}/sent_bytes']:,.0f} bytes, "
            f"{metrics['test/sent_bytes']:,.0f} an image on average"
            + (f"; latency {latency:.2f} ms." if (latency := metrics.get("test/latency_ms")) is not None else ".")
        )
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


def write_figures(metrics: Mapping[str, float], folder: Path, cfg: DictConfig, stages: Sequence[int]) -> None:
    """The pictures of a run, in ``figures/``.

    ``exits.png``: what each exit achieves and costs. ``curves.png``: the accuracies in training. With gates,
    ``saving.png``: what they save in training, and ``skips.png``: how often each block is skipped.

    Args:
        stages: number of blocks of each stage.
    """
    title = f"{cfg.backbone.name}, {cfg.method.name}, {cfg.dataset.name}"
    save(exit_figure(metrics, title), folder / "figures" / "exits.png")
    with (folder / "metrics.csv").open() as file:
        trained = "train/loss" in next(file)
    if trained:
        save(curves_figure(folder / "metrics.csv"), folder / "figures" / "curves.png")
    if not any(re.fullmatch(r"test/block_\d+/skip_ratio", name) for name in metrics):
        return
    if trained:
        save(saving_figure(folder / "metrics.csv"), folder / "figures" / "saving.png")
    gates = cfg.method.gates
    skipped = _of_blocks(metrics, "skip_ratio", sum(stages)) if gates.layer else None
    closed = _of_blocks(metrics, "closed_ratio", sum(stages)) if gates.channel else None
    saved = f"{gates.get('name', 'gates')}: {metrics['test/saving']:.1%} of the MACs saved"
    save(skips_figure(skipped, closed, stages, f"{title}; {saved}"), folder / "figures" / "skips.png")


def _of_blocks(metrics: Mapping[str, float], name: str, blocks: int) -> Ratios:
    """Of each block and of all; NaN where that is not known, as of the channels of a block that no image runs."""
    ratios = [metrics.get(f"test/block_{i}/{name}", math.nan) for i in range(1, blocks + 1)]
    return Ratios(ratios, metrics.get(f"test/{name}", math.nan))
