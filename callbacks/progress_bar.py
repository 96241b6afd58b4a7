"""Progress: a bar in a terminal, a line an epoch everywhere else."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console

LINE = ("train/loss", "train/images_per_s")  # in the line besides what is in the bar


class ProgressBar(RichProgressBar):
    """Rich's progress bar with the phase, the last exit's accuracy and the adaptive one.

    Where the output is not a terminal, such as a log file, it prints one line an epoch instead.

    Args:
        options: of Lightning's RichProgressBar.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.console = Console()
        self.phase = self.job = ""
        if not self.console.is_terminal:
            self.disable()

    def begin_run(self, config: dict[str, Any]) -> None:
        """Takes the number of the job, where the run is one of a sweep's."""
        number = config["job"]["number"]
        self.job = "" if number is None else f"[{number}] "

    def begin_phase(self, phase: str, first_step: int = 0) -> None:
        """Names the phase that the next epochs belong to."""
        self.phase = phase

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.job}{self.phase} {super()._get_train_description(current_epoch)}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The logged metrics marked for the bar, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.console.is_terminal or not trainer.is_global_zero:
            return
        shown = {*LINE, *self.get_metrics(trainer, pl_module)}
        logged = sorted((name, float(value)) for name, value in trainer.callback_metrics.items() if name in shown)
        values = "  ".join(f"{name} {value:.4g}" for name, value in logged)
        # one print, so that lines of parallel jobs do not mix
        print(f"{self.job}{self.phase} {trainer.current_epoch + 1}/{trainer.max_epochs}  {values}", flush=True)
