"""The run's metrics over time, in one CSV file that spans its phases and goes on where a run was interrupted."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

Row = dict[str, Any]
KEYS = ("phase", "epoch", "step")


class MetricsCSV(Logger):
    """``metrics.csv`` in the run directory: a row a step, with ``phase``, ``epoch`` of the phase and total ``step``.

    Metrics of the same step share a row, and a new metric widens the table. (Lightning's CSVLogger deletes the file of
    a run that is started again.)

    Args:
        run_dir: where the file is.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self.columns: list[str] = list(KEYS)
        self.phase, self.first_step = "", 0
        self._row: Row | None = None
        self._row_start = 0

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def begin_phase(self, phase: str, first_step: int = 0) -> None:
        """What follows belongs to ``phase``, whose own steps are counted from ``first_step``."""
        self.phase, self.first_step = phase, first_step

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory has its config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        place: Row = {"phase": self.phase, "epoch": int(metrics.get("epoch", 0)), "step": self.first_step + (step or 0)}
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if self._row is None:
            self._reopen(place["step"])
        if self._row and (self._row["phase"], int(self._row["step"])) == (place["phase"], place["step"]):
            self._row |= values
        else:
            self._row_start = self.path.stat().st_size if self.path.exists() else 0
            self._row = place | values
        if new := [name for name in values if name not in self.columns]:
            self.columns += sorted(new)
            self._rewrite([*self._rows_before(), self._row])
        else:
            self._write_row()

    def _reopen(self, step: int) -> None:
        """Takes up an earlier file: rows later than ``step`` are of a stretch that is being run again."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or KEYS)
            rows = [row for row in reader if int(row["step"]) <= step]
        self._rewrite(rows)
        self._row = rows[-1] if rows else None

    def _rows_before(self) -> list[Row]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            text = file.read(self._row_start).decode()
        return list(csv.DictReader(text.splitlines()))

    def _rewrite(self, rows: list[Row]) -> None:
        aside = self.path.with_suffix(".tmp")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[:-1])
            file.flush()
            self._row_start = file.tell()
            writer.writerows(rows[-1:])
        os.replace(aside, self.path)

    def _write_row(self) -> None:
        with self.path.open("r+", newline="") as file:
            file.seek(self._row_start)
            file.truncate()
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(self._row or {})
