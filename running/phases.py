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
        ValueError: an option that an objective, an optimizer or the Trainer does not take.
    """
    try:
        for phase in phases:
            phase.make_module(network).fresh_optimizer()
    except TypeError as error:
        raise ValueError(f"The optimizer does not take these options: {error}.") from error
    try:
        pl.Trainer(**trainer_options, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (TypeError, MisconfigurationException) as error:
        raise ValueError(f"The trainer does not take these options: {error}") from error


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
        trainer = _trainer(phase, i, run_dir, seed, trainer_options, callbacks, loggers)
        checkpoint = run_dir / "checkpoints" / f"{phase.name}.ckpt"
        resumed = str(checkpoint) if checkpoint.exists() else None
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        step += trainer.global_step
    results = trainer.test(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in results[0].items()}


def _trainer(
    phase: Phase,
    index: int,
    run_dir: Path,
    seed: int,
    options: Mapping[str, Any],
    callbacks: Iterable[pl.Callback],
    loggers: Sequence[Logger],
) -> pl.Trainer:
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
