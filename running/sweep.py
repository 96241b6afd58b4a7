"""What a sweep leaves when it ends: which jobs ran, which failed and why, and their metrics. Imports nothing heavy."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from running.interruption import again, stop
from storage.files import written_aside

# folder and lock of the sweep that this process has begun and not ended: whoever handles what broke it off has no
# other way to know, and Hydra sends the callback itself to the launchers' processes
running: Path | None = None
lock: FileLock | None = None
going_on = False  # the jobs' notes are of this very sweep, which is begun again for the jobs that it lost


class SweepReport(Callback):
    """Writes ``sweep.csv``, ``sweep.md`` and ``sweep.png`` when a sweep ends, and exits with 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global running, lock
        folder = Path(config.hydra.sweep.dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            stop(f"Another sweep is at work in {folder}; wait for its end, or choose another hydra.sweep.dir.")
        except OSError as error:
            stop(f"Cannot write to {folder}: {error.strerror}; choose another hydra.sweep.dir.")
        running = folder
        if going_on:
            _note_killed(folder)
        else:  # what an earlier sweep noted; its finished jobs will note themselves again
            shutil.rmtree(folder / ".jobs", ignore_errors=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = end()
        try:
            finished = folder is None or report(folder)
        except Exception as error:  # Hydra would make a warning of it
            stop(f"The tables of the sweep could not be written: {error}")
        if not finished:
            sys.exit(1)


def _note_killed(folder: Path) -> None:
    """A job that was running when the sweep broke off is the one that was killed, or ran beside it."""
    (folder / ".jobs" / "alone.txt").unlink(missing_ok=True)
    for path in (folder / ".jobs").glob("*.json"):
        note = json.loads(path.read_text())
        if note["status"] == "running":
            with written_aside(path) as file:
                file.write(json.dumps(note | {"status": "waiting", "killed": note["killed"] + 1}).encode())


def end() -> Path | None:
    """This process's sweep is over; gives its folder."""
    global running, lock
    folder, running = running, None
    if lock is not None:
        lock.release()
        lock = None
    return folder


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
