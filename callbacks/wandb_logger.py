"""A run's metrics, results and pictures in Weights & Biases, with or without an account."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pytorch_lightning.loggers import WandbLogger as LightningWandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn

from figures.run import ExitRow, exit_rows

MODES = ("auto", "online", "offline", "disabled")
OLDER_MODES = {"run": "online", "dryrun": "offline"}
HEADER_BYTES = 7  # of W&B's log file, before its first record
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 255}  # 255 is W&B's own for Ctrl-C


class WandbLogger(LightningWandbLogger):
    """One W&B run for all phases of a run: every metric over the total ``step``, rows marked with their phase.

    A run that is started again in its run directory continues its W&B run. Without an API key or a connection the run
    is kept in ``run_dir/wandb``, and its end says how to upload it.

    Args:
        run_dir: W&B's files go to the folder ``wandb`` in it.
        project: of W&B.
        entity: the user or team; None for the account's own.
        mode: ``auto`` (WANDB_MODE where it is set, otherwise online with an API key and offline without),
            ``online``, ``offline`` or ``disabled``.
        run_name: shown for the run.
        number: of the job in its sweep, added to the name; None outside one.
        group: the sweep.
        job_type: the method.
        tags: to filter runs by.
        log_network: whether ``network.safetensors`` is logged as an artifact.
        connect_timeout: seconds to wait for the server before going on offline.
        upload_timeout: seconds the end of a run waits for what is not uploaded yet.

    Raises:
        ValueError: another mode (WANDB_MODE's too), a project or tag W&B does not take, or wandb cannot be imported.
    """

    def __init__(
        self,
        run_dir: str | Path,
        project: str = "offramp",
        entity: str | None = None,
        mode: str = "auto",
        run_name: str | None = None,
        number: int | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        log_network: bool = False,
        connect_timeout: float = 20,
        upload_timeout: float = 600,
    ):
        _check(mode, project, tags)
        if number is not None:
            run_name = f"{run_name or ''} #{number}".strip()
        super().__init__(
            run_name, run_dir, project=project, entity=entity, group=group, job_type=job_type, tags=list(tags)
        )
        self._experiment: Any = None
        self.folder = Path(run_dir) / "wandb"
        self.mode, self.log_network = mode, log_network
        self.connect_timeout, self.upload_timeout = connect_timeout, upload_timeout
        self.phase, self.phase_index, self.first_step, self.last_step = "", 0, 0, 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun when it is first asked for."""
        if self._experiment is None:
            self.begin_run({})
        return self._experiment

    @rank_zero_only
    def begin_run(self, config: Mapping[str, Any]) -> None:
        """Begins the W&B run, or continues the one of this run directory.

        Args:
            config: the resolved config of the run, nested.
        """
        import wandb

        wandb.setup(wandb.Settings(silent=True, console="off"))
        self.phase_index, self.lost = 0, False
        self._id = self._stored_id()
        self._remove_empty()
        mode = self._chosen_mode()
        self._experiment = self._online(config) if mode == "online" else self._begun(mode, config)
        self._experiment.define_metric("step")
        self._experiment.define_metric("*", step_metric="step")

    def _chosen_mode(self) -> str:
        import wandb

        mode = wandb.setup().settings.mode if self.mode == "auto" else self.mode  # WANDB_MODE, or `wandb offline`
        mode = OLDER_MODES.get(mode, mode)
        if mode != "online":
            return mode
        try:
            if wandb.login(prompt=False, verify=False):
                return mode
            reason = "no API key"
        except wandb.errors.AuthenticationError as error:
            reason = _line(error)
        print(f"W&B: {reason}, so this run is offline; `wandb login` sets a key.", flush=True)
        return "offline"

    def _stored_id(self) -> str | None:
        """Of the run that this directory holds."""
        logs = self.folder.glob("*run-*/run-*.wandb")
        latest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
        return None if latest is None else latest.stem.removeprefix("run-")

    def _remove_empty(self) -> None:
        """A run killed in its first second leaves an empty log, which `wandb sync` would stop at."""
        for log in self.folder.glob("offline-run-*/run-*.wandb"):
            if log.stat().st_size <= HEADER_BYTES:
                shutil.rmtree(log.parent)

    def _online(self, config: Mapping[str, Any]) -> Any:
        import wandb

        try:
            run = self._begun("online", config)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, TimeoutError) as error:
            print(f"W&B: no connection, so this run is offline: {_line(error)}", flush=True)
            return self._begun("offline", config)
        print(f"W&B: {run.url}", flush=True)
        return run

    def _begun(self, mode: Any, config: Mapping[str, Any]) -> Any:
        import wandb

        if mode != "disabled":
            self.folder.mkdir(parents=True, exist_ok=True)
        options = {name: value for name, value in self._wandb_init.items() if value is not None and name != "id"}
        # a killed run loses what is not in its log yet; W&B's own interval is 15 s
        written: dict[str, Any] = {
            name: 1.0 for name in ("x_transaction_log_flush_interval",) if name in wandb.Settings.model_fields
        }
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=self.connect_timeout,
            finish_timeout=self.upload_timeout, finish_timeout_raises=True, **written,
        )  # fmt: skip
        return wandb.init(
            **options, id=self._id, mode=mode, config=dict(config), reinit="create_new", settings=settings
        )

    def begin_phase(self, phase: str, first_step: int = 0) -> None:
        """What follows belongs to ``phase``, whose own steps are counted from ``first_step``; phases count from 1."""
        self.phase, self.first_step = phase, first_step
        self.phase_index += 1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs one row.

        Args:
            step: of the phase; None for the last one logged.
        """
        if step is not None:
            self.last_step = self.first_step + step
        place = {"phase": self.phase, "phase_index": self.phase_index, "step": self.last_step}
        import wandb

        try:
            self.experiment.log({**metrics, **place})
        except (wandb.errors.Error, OSError) as error:  # its own process is gone: no reason for the run to end
            if not self.lost:
                print(f"W&B: lost, the run goes on without it: {_line(error)}", flush=True)
            self.lost = True

    @rank_zero_only
    def end_run(self, metrics: Mapping[str, float] | None, network: nn.Module, folder: Path, status: str) -> None:
        """Logs the results of a run that came to its end, and ends the W&B run.

        Args:
            metrics: the test metrics; None unless finished.
            network: not needed, its weights are taken from ``folder``.
            folder: the run directory, with ``figures`` and ``network.safetensors``.
            status: ``finished``, ``failed`` or ``interrupted``.
        """
        if self._experiment is None:
            return
        import wandb

        try:
            self._experiment.summary["status"] = status
            if metrics is not None:
                self._log_results(metrics, folder)
        except wandb.errors.Error as error:  # a lost connection does not make a run fail
            print(f"W&B: not all results could be logged: {_line(error)}", flush=True)
        finally:
            self._end(status)

    def _log_results(self, metrics: Mapping[str, float], folder: Path) -> None:
        import wandb

        self._experiment.summary.update(dict(metrics))
        for picture in sorted((folder / "figures").glob("*.png")):
            self.log_image(f"figures/{picture.stem}", [str(picture)])
        columns = [name.replace("macs", "MACs") for name in ExitRow._fields]
        self.log_table("exits", columns, [list(row) for row in exit_rows(metrics)])
        if self.log_network:
            artifact = wandb.Artifact(f"network-{self._experiment.id}", "model", metadata=dict(metrics))
            # without a copy: a run directory stays where it is
            artifact.add_file(str((folder / "network.safetensors").resolve()), policy="immutable")
            self._experiment.log_artifact(artifact)

    def _end(self, status: str) -> None:
        import wandb

        run, self._experiment = self._experiment, None
        command = f"wandb sync {shlex.quote(str(self.folder))}"
        try:
            run.finish(exit_code=EXIT_CODES[status])
        except TimeoutError:
            print(f"W&B: not all is uploaded; to go on: {command} --include-online", flush=True)
        else:
            if run.settings.mode == "offline":
                print(f"W&B: to upload this run: {command}", flush=True)
        # the next run of a sweep in this process starts afresh, with nothing left open
        wandb.teardown()


def _check(mode: str, project: str, tags: Sequence[str]) -> None:
    if mode not in MODES:
        raise ValueError(f"Expected logger.wandb.mode to be one of {', '.join(MODES)}, got {mode}.")
    if (variable := os.environ.get("WANDB_MODE", "online")) not in (*MODES[1:], *OLDER_MODES):
        raise ValueError(f"Expected WANDB_MODE to be one of {', '.join(MODES[1:])}, got {variable}.")
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"logger=wandb needs the package wandb: pip install wandb ({error}).") from error
    try:
        wandb.Settings(project=project, run_tags=tuple(tags))
    except (wandb.errors.UsageError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else _line(error)
        raise ValueError(f"W&B does not take logger.wandb.project or logger.wandb.tags: {reason}.") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".")
