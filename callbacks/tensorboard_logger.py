"""A run's metrics, results and pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.image
import yaml
from pytorch_lightning.loggers import TensorBoardLogger as LightningTensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn

from figures.run import exit_cells


class TensorBoardLogger(LightningTensorBoardLogger):
    """Event files in ``run_dir/tensorboard``: every metric over the run's total step, its phases marked.

    ``phase_index`` counts the phases from 1; the text ``phase`` names each at its first step.

    Args:
        run_dir: the folder ``tensorboard`` is made in it.

    Raises:
        ValueError: tensorboard cannot be imported.
    """

    def __init__(self, run_dir: str | Path):
        try:
            super().__init__(run_dir, name="tensorboard", version="")
        except ModuleNotFoundError as error:
            raise ValueError("logger=tensorboard needs the package tensorboard: pip install tensorboard.") from error
        self.phase, self.phase_index, self.first_step, self.last_step = "", 0, 0, 0
        self._named = 0

    @rank_zero_only
    def begin_run(self, config: Mapping[str, Any]) -> None:
        """Notes the resolved config of the run, nested, as a text."""
        self.phase_index = self._named = 0
        text = yaml.safe_dump(dict(config), sort_keys=False)
        self.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def begin_phase(self, phase: str, first_step: int = 0) -> None:
        """What follows belongs to ``phase``, whose own steps are counted from ``first_step``."""
        self.phase, self.first_step = phase, first_step
        self.phase_index += 1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs metrics of a step of the phase."""
        self.last_step = self.first_step + (step or 0)
        if self._named != self.phase_index:
            self.experiment.add_text("phase", self.phase, self.last_step)
            self._named = self.phase_index
        super().log_metrics({**metrics, "phase_index": self.phase_index}, self.last_step)

    def save(self) -> None:
        """Nothing: the run directory has its config.yaml, and the events are written at a run's and a phase's end."""

    @rank_zero_only
    def end_run(self, metrics: Mapping[str, float] | None, network: nn.Module, folder: Path, status: str) -> None:
        """Adds the table of the exits and the pictures in ``folder/figures``, and closes the files.

        Args:
            metrics: the test metrics; None unless finished.
            network: not needed.
            folder: the run directory.
            status: ``finished``, ``failed`` or ``interrupted``.
        """
        if metrics is not None:
            self.experiment.add_text("exits", _markdown(metrics), self.last_step)
            for picture in sorted((folder / "figures").glob("*.png")):
                pixels = matplotlib.image.imread(picture)
                self.experiment.add_image(f"figures/{picture.stem}", pixels, self.last_step, dataformats="HWC")
        self.experiment.add_text("status", status, self.last_step)
        self.experiment.close()


def _markdown(metrics: Mapping[str, float]) -> str:
    columns, rows = exit_cells(metrics)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))
