"""A run as Hydra starts it: alone, or as one job of a sweep that goes on when a job fails. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from running import sweep
from running.command_line import Refused
from running.interruption import Stopped, end_stopped, end_with_parent, is_first, stop, stopping
from storage.files import written_aside

PATIENCE = 60  # seconds
Train = Callable[[DictConfig, Path], dict[str, float]]


@dataclass
class Job:
    """What a sweep knows of one of its runs.

    Attributes:
        number: from 0, in the order of the sweep.
        folder: the run directory.
        overrides: what sets it apart, ``key=value``.
        status: how far it came.
        reason: of a failure, in one line.
        killed: how often its process ended without a word while it ran, or ran beside it.
    """

    number: int
    folder: str
    overrides: list[str]
    status: Literal["waiting", "running", "finished", "failed", "stopped"] = "running"
    reason: str = ""
    killed: int = 0

    @classmethod
    def taken_up(cls, number: int, folder: Path, overrides: list[str], sweep_folder: Path) -> Job:
        """The job, with what it noted when the same sweep began it before."""
        job = cls(number, str(folder), overrides)
        note = sweep_folder / ".jobs" / f"{number}.json"
        if note.exists():
            earlier = cls(**json.loads(note.read_text()))
            job.killed = earlier.killed
            if earlier.status == "failed":
                job.status, job.reason = earlier.status, earlier.reason
        if job.killed == 1 and job.status == "running":
            job.status = "waiting"
        if job.killed > 1:
            job.status, job.reason = "failed", "its process was killed, and killed again when it ran alone"
        return job

    @contextmanager
    def alone(self, sweep_folder: Path) -> Iterator[None]:
        """A job that was lost with its process runs beside no other such job, so that it is known which one it is."""
        if not self.killed:
            yield
            return
        mark = sweep_folder / ".jobs" / "alone.txt"
        with FileLock(mark.with_suffix(".lock")):
            if mark.exists():  # the job before this one was killed, and this process is about to be
                time.sleep(PATIENCE)
            mark.touch()
            if Path(self.folder).is_dir():  # the process that was lost with another one may take a moment to end
                with FileLock(Path(self.folder) / ".lock", timeout=PATIENCE):
                    pass
            self.status = "running"
            self.write(sweep_folder)
            try:
                yield
            finally:
                mark.unlink(missing_ok=True)

    def write(self, folder: Path) -> None:
        """Notes it in the sweep's folder, each job in a file of its own: jobs run side by side."""
        if is_first():
            with written_aside(folder / ".jobs" / f"{self.number}.json") as file:
                file.write(json.dumps(asdict(self)).encode())


def run_job(train: Train, cfg: DictConfig) -> float:
    """Trains; gives the test accuracy, NaN for a job of a sweep that failed."""
    config = HydraConfig.get()
    folder = Path(config.runtime.cwd, config.runtime.output_dir)
    if config.mode == RunMode.MULTIRUN:
        _settle_in(config.launcher._target_.rpartition(".")[2])
        cfg.job = {"sweep": sweep_name(config.sweep.dir), "number": config.job.num}
        # a launcher's process may have another working directory
        parent = Path(config.runtime.cwd, config.sweep.dir)
        job = Job.taken_up(config.job.num, folder, list(config.overrides.task), parent)
        return _job_of_a_sweep(train, cfg, job, parent)
    try:
        with stopping():
            return train(cfg, folder)["test/acc"]
    except Refused as error:
        _remove_if_empty(folder)
        stop(str(error))
    except Stopped as stopped:
        _remove_if_empty(folder)
        end_stopped(stopped, "hydra.run.dir", folder)


def _settle_in(launcher: str) -> None:
    """Fits the process of a launcher to running jobs of which it is one."""
    if launcher == "JoblibLauncher":
        end_with_parent()
    if launcher != "BasicLauncher":
        # a line an epoch: the progress bars of jobs side by side would draw over each other
        os.environ["TTY_COMPATIBLE"] = "0"


def sweep_name(folder: str) -> str:
    """The sweep's folder, as it is shown: relative as it is, of an absolute one its last part."""
    return Path(folder).name if Path(folder).is_absolute() else folder


def _job_of_a_sweep(train: Train, cfg: DictConfig, job: Job, folder: Path) -> float:
    accuracy = float("nan")
    job.write(folder)
    if job.status == "failed":  # in this very sweep, before another job was killed
        return accuracy
    try:
        with stopping(), job.alone(folder):
            accuracy = train(cfg, Path(job.folder))["test/acc"]
    except Stopped:
        job.status = "stopped"
        if sweep.running is not None:  # this process is the sweep's own, and not a launcher's
            raise
    except Exception as error:
        job.status, job.reason = "failed", str(error) if isinstance(error, Refused) else _unexpected(error, job)
        print(f"error in job {job.number}: {job.reason}", file=sys.stderr, flush=True)
        _remove_if_empty(Path(job.folder))
    else:
        job.status = "finished"
    finally:
        job.write(folder)
    return accuracy


def _unexpected(error: Exception, job: Job) -> str:
    trace = Path(job.folder) / "error.txt"
    trace.write_text("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {' '.join(str(error).split())} (all of it in {trace})"


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
