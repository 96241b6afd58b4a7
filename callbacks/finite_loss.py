"""Ends a run whose loss is no longer a number, before a checkpoint is made of it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class NonFiniteLoss(ValueError):
    """The loss or a weight became infinite or NaN."""


class FiniteLoss(pl.Callback):
    """Watches every step's loss, and the weights at an epoch's end.

    The losses are gathered on the device and looked at every ``every_n_steps`` steps, since looking waits for the GPU.

    Raises:
        NonFiniteLoss: in training, naming the phase, the step and what to change.
    """

    def __init__(self, every_n_steps: int = 20):
        self.every_n_steps = every_n_steps
        self.phase = ""

    def begin_phase(self, phase: str, first_step: int = 0) -> None:
        """Names the phase that the next epochs belong to."""
        self.phase = phase

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[no-untyped-def]
        self.losses.append(outputs["loss"].detach().float())
        self.steps.append(trainer.global_step - 1)
        last = trainer.is_last_batch
        if len(self.losses) < self.every_n_steps and not last:
            return
        losses = torch.stack(self.losses)
        if trainer.world_size > 1:  # a sum with a NaN of any process is NaN in all of them
            losses = trainer.strategy.reduce(losses, reduce_op="sum")
        if bad := (~losses.isfinite()).nonzero().flatten().tolist():
            self._stop(trainer, f"The loss is {losses[bad[0]].item()}", self.steps[bad[0]])
        self.losses.clear()
        self.steps.clear()
        if last and not all(weight.isfinite().all() for weight in pl_module.parameters() if weight.requires_grad):
            self._stop(trainer, "A weight is not finite", trainer.global_step - 1)

    def _stop(self, trainer: pl.Trainer, what: str, step: int) -> None:
        done = trainer.current_epoch
        kept = f"the checkpoint of epoch {done} is kept" if done else "the phase has no checkpoint yet"
        raise NonFiniteLoss(
            f"{what} in phase {self.phase}, epoch {done + 1}, step {step} of the phase; {kept}. "
            "Lower optimizer.lr, or set trainer.gradient_clip_val, in a new run directory."
        )
