"""The run's metrics over time, in one CSV file that spans its phases and goes on where a run was interrupted."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from storage.files import written_aside

Row = dict[str, Any]
KEYS = ("phase", "epoch", "step")


def shortest(value: float) -> float:
    """The same single-precision number with no more digits than tell it apart: 0.833, not 0.8330000042915344."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


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
        values = {name: shortest(value) for name, value in metrics.items() if name != "epoch"}
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
        lines = self.path.read_text().splitlines(keepends=True)
        # a last line without an end was being written when the run was killed
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))
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
        before = self._lines([dict(zip(self.columns, self.columns, strict=True)), *rows[:-1]])
        self._row_start = len(before)
        with written_aside(self.path) as file:
            file.write(before + self._lines(rows[-1:]))

    def _write_row(self) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._row_start)
            # over what is there, and only then shortened: a process killed in between has lost nothing
            file.write(self._lines([self._row or {}]))
            file.truncate()

    def _lines(self, rows: list[Row]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()
