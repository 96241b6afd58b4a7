"""A run as Hydra starts it: alone, or as one job of a sweep that goes on when a job fails. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from running.command_line import Refused, stop
from running.interruption import Stopped, end_stopped

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
    """

    number: int
    folder: str
    overrides: list[str]
    status: Literal["running", "finished", "failed", "stopped"] = "running"
    reason: str = ""

    def write(self, sweep: Path) -> None:
        """Notes it in the sweep's folder, each job in a file of its own: jobs run side by side."""
        target = sweep / ".jobs" / f"{self.number}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self)))
        os.replace(aside, target)


def run_job(train: Train, cfg: DictConfig) -> float:
    """Trains; gives the test accuracy, NaN for a job of a sweep that failed."""
    config = HydraConfig.get()
    folder = Path(config.runtime.cwd, config.runtime.output_dir)
    if config.mode == RunMode.MULTIRUN:
        job = Job(config.job.num, str(folder), list(config.overrides.task))
        if not config.launcher._target_.endswith("BasicLauncher"):
            # a line an epoch: the progress bars of jobs side by side would draw over each other
            os.environ["TTY_COMPATIBLE"] = "0"
        cfg.job = {"sweep": sweep_name(config.sweep.dir), "number": job.number}
        # a launcher's process may have another working directory
        return _job_of_a_sweep(train, cfg, job, Path(config.runtime.cwd, config.sweep.dir))
    try:
        return train(cfg, folder)["test/acc"]
    except Refused as error:
        _remove_if_empty(folder)
        stop(str(error))
    except Stopped as stopped:
        end_stopped(stopped, "hydra.run.dir", folder)


def sweep_name(folder: str) -> str:
    """The sweep's folder, as it is shown: relative as it is, of an absolute one its last part."""
    return Path(folder).name if Path(folder).is_absolute() else folder


def _job_of_a_sweep(train: Train, cfg: DictConfig, job: Job, sweep: Path) -> float:
    job.write(sweep)
    try:
        accuracy = train(cfg, Path(job.folder))["test/acc"]
    except Stopped:
        job.status = "stopped"
        raise
    except Exception as error:
        accuracy = float("nan")
        job.status, job.reason = "failed", str(error) if isinstance(error, Refused) else _unexpected(error, job)
        print(f"error in job {job.number}: {job.reason}", file=sys.stderr, flush=True)
        _remove_if_empty(Path(job.folder))
    else:
        job.status = "finished"
    finally:
        job.write(sweep)
    return accuracy


def _unexpected(error: Exception, job: Job) -> str:
    trace = Path(job.folder) / "error.txt"
    trace.write_text("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {' '.join(str(error).split())} (all of it in {trace})"


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
