"""What makes an epoch of a run the same whenever it runs: its random numbers, and its row of metrics."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from datamodules.sampling import epoch_seed


class EpochSeed(pl.Callback):
    """Seeds all random numbers from (run seed, phase, epoch), so that an epoch does not depend on what ran before.

    Each process has its own, for what it draws for its share of a batch.
    """

    def __init__(self, seed: int, phase: int):
        self.seed, self.phase = seed, phase

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        process = [trainer.global_rank] if trainer.global_rank else []
        pl.seed_everything(epoch_seed(self.seed, self.phase, trainer.current_epoch, *process), verbose=False)


class EpochRow(pl.Callback):
    """Keeps an epoch's metrics in its checkpoint, and logs them again when a run goes on from there.

    Lightning logs them after the checkpoint is taken, so that a run killed in between would have lost them.

    Args:
        last: whether this phase is the last that has a checkpoint; what earlier ones logged is complete.
    """

    def __init__(self, last: bool):
        self.last, self.step = last, 0
        self.row: dict[str, float] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated: dict[str, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = _logged(trainer, "val/")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        row = {"epoch": trainer.current_epoch, **self.validated, **_logged(trainer, "train/")}
        checkpoint["epoch_row"] = {"step": trainer.global_step - 1, "row": row}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.step, self.row = checkpoint["epoch_row"]["step"], checkpoint["epoch_row"]["row"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.row is not None and self.last:
            for logger in trainer.loggers:
                logger.log_metrics(self.row, self.step)


def _logged(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
