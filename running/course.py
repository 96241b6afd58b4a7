"""Carries out the phases of a method one after another on one shared network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger

from callbacks.metrics_csv import shortest
from callbacks.progress_bar import ProgressBar
from datamodules.image_data import ImageData
from inference.points import from_plain, to_plain
from inference.policies import Policy
from inference.replay import kinds, replay
from inference.trace import Trace
from lightning_modules.classifier import Classifier, Frozen
from networks.early_exit_network import EarlyExitNetwork
from running.epochs import EpochRow, EpochSeed
from running.interruption import is_first
from running.phases import Choosing, Phase, Training
from running.processes import Agreement
from running.recording import Outputs, record_validation
from storage.checkpoints import SealedCheckpoints
from storage.run_directory import RunDirectory


@dataclass
class Course:
    """Takes a run through its phases.

    Each phase that trains has a fresh Trainer and leaves ``checkpoints/<phase>.ckpt``, taken at every epoch's end. A
    phase whose checkpoint is there already goes on from it, or is only loaded when it was complete. A phase that
    chooses notes its choice in ``operating_point.json``.

    Args:
        network, data: shared by the phases.
        run_dir: of the run.
        seed: of the run.
        policy: what the run begins with; phases may choose another.
        options: keyword arguments of every phase's Trainer.
        callbacks, loggers: shared by the phases; one with ``begin_phase`` is told of each, one with ``use`` of each
            policy.
    """

    network: EarlyExitNetwork
    data: ImageData
    run_dir: RunDirectory
    seed: int
    policy: Policy
    options: Mapping[str, Any]
    callbacks: Sequence[pl.Callback] = ()
    loggers: Sequence[Logger] = ()
    step: int = field(default=0, init=False)
    last: int = field(default=0, init=False)

    def run(self, phases: Sequence[Phase]) -> dict[str, float]:
        """Carries out all phases and tests the result.

        Returns:
            The test metrics by name.
        """
        self._tell_policy()
        tested: tuple[pl.Trainer, Classifier] | None = None
        for i, phase in enumerate(phases):
            # what a phase that chooses logs, and the test after it, is counted on from the last Trainer's steps
            chooses = isinstance(phase, Choosing)
            self._begin(phase.name, self.step - self.last if chooses else self.step)
            later = any(self._checkpoint(other).exists() for other in phases[i + 1 :])
            if isinstance(phase, Choosing):
                self._choose(phase, later)
            else:
                tested = self._train(phase, i, later)
        trainer, module = tested or (self._trainer(self.callbacks, self.loggers), Frozen(self.network))
        if tested is None:
            self._begin("test", self.step)
        results = trainer.test(module, datamodule=self.data, verbose=False)
        return {name: shortest(float(value)) for name, value in results[0].items()}

    def _begin(self, phase: str, first_step: int) -> None:
        for part in (*self.callbacks, *self.loggers):
            if hasattr(part, "begin_phase"):
                part.begin_phase(phase, first_step)

    def _checkpoint(self, phase: Phase) -> Path:
        return self.run_dir.path / "checkpoints" / f"{phase.name}.ckpt"

    def _train(self, phase: Training, index: int, later: bool) -> tuple[pl.Trainer, Classifier]:
        module = phase.make_module(self.network, self.policy)
        self.data.begin_phase(self.seed, index)
        row, checkpoint = EpochRow(last=not later), self._checkpoint(phase)
        options, folder = self.options, self.run_dir.path
        trainer = phase_trainer(phase, index, folder, self.seed, options, [*self.callbacks, row], self.loggers)
        resumed = str(checkpoint) if checkpoint.exists() else None
        trainer.fit(module, datamodule=self.data, ckpt_path=resumed, weights_only=True)
        self.last = trainer.global_step
        self.step += self.last
        return trainer, module

    def _choose(self, phase: Choosing, later: bool) -> None:
        # what later phases trained on; otherwise an earlier choice may be of other weights
        noted = self.run_dir.operating_point(phase.name) if later else None
        chosen = None if noted is None else from_plain(noted)
        if chosen is None:
            seen, bars = Outputs(), [part for part in self.callbacks if isinstance(part, ProgressBar)]
            trace = record_validation(self.network, self.data, self._trainer([seen, *bars]), seen)
            chosen = phase.choice(self.policy, trace)
            self._report(phase.name, chosen, trace)
            if is_first():
                self.run_dir.note_operating_point(phase.name, to_plain(chosen))
        self.policy = chosen
        self._tell_policy()

    def _tell_policy(self) -> None:
        for part in (*self.callbacks, *self.loggers):
            if hasattr(part, "use"):
                part.use(self.policy)

    def _report(self, phase: str, policy: Policy, trace: Trace) -> None:
        """Logs and prints what a choice comes to on the validation split."""
        outcome = replay(policy, trace)
        right = (outcome.prediction.label == trace.labels).double().mean().item()
        values = {f"val/{kind}": outcome.cost(trace, kind).double().mean().item() for kind in kinds(trace.costs)}
        for logger in self.loggers:
            logger.log_metrics({"epoch": 0, "val/acc": right, **values}, self.last)
        thresholds = "  ".join(
            f"{name} {' '.join(f'{float(value):.4g}' for value in each)}"
            for name, each in to_plain(policy).items()
            if isinstance(each, list)
        )
        if is_first():
            print(f"{phase}  {thresholds}  val/acc {right:.4g}  val/macs {values['val/macs']:,.0f}", flush=True)

    def _trainer(self, callbacks: Sequence[pl.Callback], loggers: Sequence[Logger] = ()) -> pl.Trainer:
        """One that trains nothing."""
        return pl.Trainer(
            **self.options,
            callbacks=list(callbacks),
            use_distributed_sampler=False,  # the data set shares itself out
            logger=list(loggers),
            enable_checkpointing=False,
            enable_model_summary=False,
        )


def require_choices(phases: Sequence[Phase], run_dir: RunDirectory) -> None:
    """Whether what earlier phases chose is still there where later ones have trained on it.

    Raises:
        ValueError: it is missing or damaged.
    """
    trained = {path.stem for path in run_dir.checkpoints}
    for i, phase in enumerate(phases):
        if isinstance(phase, Choosing) and any(later.name in trained for later in phases[i + 1 :]):
            noted = run_dir.operating_point(phase.name)
            if noted is None:
                raise ValueError(
                    f"Expected operating_point.json in {run_dir.path} to say what phase {phase.name} chose; put it "
                    "back, or choose another hydra.run.dir."
                )
            from_plain(noted)


def phase_trainer(
    phase: Training,
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
