"""Runs the phases of a method one after another on one shared network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from callbacks.metrics_csv import shortest
from datamodules.image_data import ImageData
from datamodules.sampling import epoch_seed
from lightning_modules.classifier import Classifier
from networks.exits import EarlyExitNetwork
from running.processes import Agreement, to_start
from storage.checkpoints import SealedCheckpoints

Row = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One stage of a method's training.

    Attributes:
        name: unique in the run; names its checkpoint.
        epochs: its length.
        make_module: wraps the shared network in this phase's objective.
    """

    name: str
    epochs: int
    make_module: Callable[[EarlyExitNetwork], Classifier]


def check(phases: Sequence[Phase], network: EarlyExitNetwork, trainer_options: Mapping[str, Any]) -> int:
    """Builds once what the phases will build, so that a wrong option is found before any data is read.

    Returns:
        How many processes this one has to make of itself.

    Raises:
        ValueError: an option that an objective, an optimizer, a scheduler or the Trainer does not take, or an exit that
            no phase trains.
    """
    trained: set[int] = set()
    for phase in phases:
        try:
            module = phase.make_module(network)
        except TypeError as error:
            raise ValueError(f"The objective of phase {phase.name} does not take these options: {error}.") from error
        trained |= {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
        try:
            module.fresh_scheduler(module.fresh_optimizer(), total_steps=100)
        except TypeError as error:
            raise ValueError(f"The optimizer or scheduler does not take these options: {error}.") from error
    for k, head in enumerate(network.heads, start=1):
        if not all(id(parameter) in trained for parameter in head.parameters()):
            raise ValueError(f"No phase of the method trains exit {k}; choose method/exits=none or method=early_exit.")
    return _check_trainer(trainer_options)


def _check_trainer(options: Mapping[str, Any]) -> int:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = pl.Trainer(**options, max_epochs=1, **silent)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"The trainer does not take these options: {error}") from error
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            f"Expected trainer.precision to be auto, 32-true, bf16-mixed or 16-mixed, got {trainer.precision}."
        )
    for key in ("limit_train_batches", "limit_test_batches"):
        if getattr(trainer, key) == 0:
            raise ValueError(f"Expected trainer.{key} above 0: a run trains, and ends with its test.")
    return to_start(trainer)


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


def run_phases(
    phases: Sequence[Phase],
    network: EarlyExitNetwork,
    data: ImageData,
    run_dir: Path,
    seed: int,
    trainer_options: Mapping[str, Any],
    callbacks: Iterable[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> dict[str, float]:
    """Trains all phases and tests the result.

    Each phase has a fresh Trainer and leaves ``checkpoints/<phase>.ckpt``, taken at every epoch's end. A phase whose
    checkpoint is there already goes on from it, or is only loaded when it was complete.

    Args:
        trainer_options: keyword arguments of every phase's Trainer.
        callbacks, loggers: shared by the phases; one with ``begin_phase`` is told of each.

    Returns:
        The test metrics by name.
    """
    step = 0
    files = [run_dir / "checkpoints" / f"{phase.name}.ckpt" for phase in phases]
    for i, (phase, checkpoint) in enumerate(zip(phases, files, strict=True)):
        module = phase.make_module(network)
        listeners = [part for part in (*callbacks, *loggers) if hasattr(part, "begin_phase")]
        for part in listeners:
            part.begin_phase(phase.name, step)
        data.begin_phase(seed, i)
        row = EpochRow(last=not any(later.exists() for later in files[i + 1 :]))
        trainer = phase_trainer(phase, i, run_dir, seed, trainer_options, [*callbacks, row], loggers)
        resumed = str(checkpoint) if checkpoint.exists() else None
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        step += trainer.global_step
    results = trainer.test(module, datamodule=data, verbose=False)
    return {name: shortest(float(value)) for name, value in results[0].items()}


def phase_trainer(
    phase: Phase,
    index: int,
    run_dir: Path,
    seed: int,
    options: Mapping[str, Any],
    callbacks: Iterable[pl.Callback],
    loggers: Sequence[Logger],
) -> pl.Trainer:
    """The Trainer of one phase: seeds every epoch, and leaves a checkpoint at its end."""
    checkpoints = ModelCheckpoint(
        run_dir / "checkpoints", phase.name, save_on_train_epoch_end=True, enable_version_counter=False
    )
    return pl.Trainer(
        **options,
        max_epochs=phase.epochs,
        callbacks=[*callbacks, EpochSeed(seed, index), Agreement(), checkpoints],
        plugins=[SealedCheckpoints()],
        use_distributed_sampler=False,  # the data set shares itself out
        logger=list(loggers),
        default_root_dir=run_dir,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def quiet_lightning() -> None:
    """Silences Lightning's banners, and warnings about what is meant as it is."""
    for library in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in (
        "The '.*_dataloader' does not have many workers",  # images in memory need none
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",  # a run directory that was moved
        "You're resuming from a checkpoint that ended before the epoch ended",
        "It is recommended to use `self.log\\(.*sync_dist=True\\)`",  # those are of all processes already
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
