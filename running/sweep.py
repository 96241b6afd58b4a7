"""What a sweep leaves when it ends: which jobs ran, which failed and why, and their metrics. Imports nothing heavy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from running.interruption import again


class SweepReport(Callback):
    """Writes ``sweep.csv`` and ``sweep.md`` when a sweep ends, prints them, and exits with status 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global running
        running = Path(config.hydra.sweep.dir)
        # what an earlier start noted; its finished jobs will note themselves again
        shutil.rmtree(running / ".jobs", ignore_errors=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        global running
        folder, running = Path(config.hydra.sweep.dir), None
        if not report(folder):
            sys.exit(1)


# of the sweep this process has begun and not ended: whoever handles what broke it off has no other way to know
running: Path | None = None


def report(folder: Path, hint: bool = True) -> bool:
    """Writes and prints the tables of a sweep, and how to run what is not finished.

    Returns:
        Whether every job of it that was begun is finished.
    """
    from running.sweep_tables import print_tables, read_jobs, write_tables

    jobs = read_jobs(folder)
    if jobs.empty:
        return True
    write_tables(jobs, folder)
    print_tables(jobs, folder)
    finished = int((jobs.status == "finished").sum())
    if hint and finished < len(jobs):
        print(
            f"{len(jobs) - finished} of {len(jobs)} jobs are not finished. To run those alone: "
            f"{again('hydra.sweep.dir', folder)}",
            file=sys.stderr,
        )
    return finished == len(jobs)
