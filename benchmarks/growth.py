"""Memory, open files and bytes written of a tiny run, epoch by epoch.

python -m benchmarks.growth 200 docs/growth.png
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import open_dict

from figures.look import save
from train import train

ROOT = Path(__file__).parents[1]
RUN = [
    *("backbone=resnet8", "method=early_exit", "method/heads=light", "dataset.batch_size=16"),
    *("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true"),
]


@dataclass
class Epoch:
    """At an epoch's end: resident memory, open file handles, bytes of metrics.csv, bytes of all files of the run."""

    memory: int
    handles: int
    log: int
    files: int


class Growth(pl.Callback):
    """Notes an ``Epoch`` whenever one ends."""

    seen: list[Epoch] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            return
        process, folder = psutil.Process(), Path(trainer.default_root_dir)
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        log = sizes[folder / "metrics.csv"]
        self.seen.append(Epoch(process.memory_info().rss, process.num_fds(), log, sum(sizes.values())))


def measured(epochs: int, folder: Path) -> list[Epoch]:
    """Trains for so many epochs."""
    from benchmarks.growth import Growth as Noted  # as Hydra imports it, also where this file is the program

    Noted.seen = []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[*RUN, f"epochs={epochs}"])
    with open_dict(cfg):
        cfg.callbacks.growth = {"_target_": "benchmarks.growth.Growth"}
    train(cfg, folder)
    return Noted.seen


def slope(values: list[int]) -> float:
    """Growth an epoch over the second half, from the medians of its two halves: one jump does not count as a trend."""
    half = np.array(values[len(values) // 2 :], dtype=float)
    first, second = np.array_split(half, 2)
    return float(np.median(second) - np.median(first)) / (len(half) / 2)


def figure(seen: list[Epoch]) -> Figure:
    """The four over the epochs."""
    picture = Figure(figsize=(9, 2.8), layout="constrained")
    written = np.diff([epoch.log for epoch in seen], prepend=0)
    panels = {
        "memory, MB": [epoch.memory / 1e6 for epoch in seen],
        "open files": [epoch.handles for epoch in seen],
        "metrics.csv, bytes an epoch": written[1:],
    }
    for axes, (title, values) in zip(picture.subplots(1, 3), panels.items(), strict=True):
        axes.plot(range(len(seen) - len(values) + 1, len(seen) + 1), values, color="#0072B2", linewidth=1.5)
        axes.set(title=title, xlabel="epoch", ylim=(0, 1.3 * max(values)))
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    epochs, target = int(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        seen = measured(epochs, Path(folder))
    save(figure(seen), target)
    written = np.diff([epoch.log for epoch in seen])
    print(
        f"An epoch of the second half adds {slope([e.memory for e in seen]) / 1e3:.1f} kB of memory, "
        f"{slope([e.handles for e in seen]):.2f} open files and {np.median(written):.0f} bytes of metrics.csv "
        f"(from {written.min()} to {written.max()})."
    )


if __name__ == "__main__":
    main()
