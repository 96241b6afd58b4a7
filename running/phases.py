"""Runs the phases of a method one after another on one shared network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_modules.classifier import Classifier
from networks.exits import EarlyExitNetwork


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


def check(phases: Sequence[Phase], network: EarlyExitNetwork, trainer_options: Mapping[str, Any]) -> None:
    """Builds once what the phases will build, so that a wrong option is found before any data is read.

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
    _check_trainer(trainer_options)


def _check_trainer(options: Mapping[str, Any]) -> None:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = pl.Trainer(**options, max_epochs=1, **silent)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"The trainer does not take these options: {error}") from error
    if trainer.world_size > 1:
        raise ValueError(f"Expected trainer.devices=1, the only number so far; got {trainer.world_size}.")
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            f"Expected trainer.precision to be auto, 32-true, bf16-mixed or 16-mixed, got {trainer.precision}."
        )
    if trainer.limit_test_batches == 0:
        raise ValueError("Expected trainer.limit_test_batches above 0: a run ends with its test.")


class EpochSeed(pl.Callback):
    """Seeds all random numbers from (run seed, phase, epoch), so that an epoch does not depend on what ran before."""

    def __init__(self, seed: int, phase: int):
        self.seed, self.phase = seed, phase

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        words = np.random.SeedSequence([self.seed, self.phase, trainer.current_epoch]).generate_state(1)
        pl.seed_everything(int(words[0]), verbose=False)


def run_phases(
    phases: Sequence[Phase],
    network: EarlyExitNetwork,
    data: pl.LightningDataModule,
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
    for i, phase in enumerate(phases):
        module = phase.make_module(network)
        listeners = [part for part in (*callbacks, *loggers) if hasattr(part, "begin_phase")]
        for part in listeners:
            part.begin_phase(phase.name, step)
        trainer = phase_trainer(phase, i, run_dir, seed, trainer_options, callbacks, loggers)
        checkpoint = run_dir / "checkpoints" / f"{phase.name}.ckpt"
        resumed = str(checkpoint) if checkpoint.exists() else None
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        step += trainer.global_step
    results = trainer.test(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in results[0].items()}


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
        callbacks=[*callbacks, EpochSeed(seed, index), checkpoints],
        logger=list(loggers),
        default_root_dir=run_dir,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def quiet_lightning() -> None:
    """Silences Lightning's banners, and warnings about what is meant as it is."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        "The '.*_dataloader' does not have many workers",  # images in memory need none
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
