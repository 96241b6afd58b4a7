"""How hard gates are pressed to skip, so that a target is met."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RAMP = 0.25  # share of the steps over which the target rises from where the saving stands
GAIN = 25.0  # of the multiplier over a whole phase
PENALTY = 4.0
LEAST, MOST = -1.0, 20.0
MEMORY = 0.05  # weight of a batch in the running saving


class Pressure(nn.Module):
    """The weight of the used share of a resource in a loss, such that the saved share comes to a target.

    The method of multipliers for the constraint saving = target: with the lack e = target - saving of each batch the
    weight is λ + penalty · e, and λ grows by a multiple of e that does not hang on the number of steps. It is negative
    where too much is saved. Saving in evaluation may differ from that in training, where BatchNorm uses the batch's
    statistics: ``correct`` moves the target by what they differ.

    Args:
        target: share to be saved.

    Raises:
        ValueError: a target outside 0 to below 1.
    """

    multiplier: Tensor
    running: Tensor
    first: Tensor
    shift: Tensor
    last: Tensor

    def __init__(self, target: float):
        super().__init__()
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target < 1:
            raise ValueError(f"Expected method.target_saving from 0 to below 1, or null, got {target}.")
        self.target = target
        for name, value in (
            ("multiplier", 0.0),
            ("running", torch.nan),
            ("first", torch.nan),
            ("shift", 0.0),
            ("last", 0.0),
        ):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, saving: Tensor, done: float) -> Tensor:
        """The weight for a batch.

        Args:
            saving: of the batch.
            done: share of the phase's steps.
        """
        if self.running.isnan():
            self.running, self.first = saving.clone(), saving.clone()
        self.running = self.running + MEMORY * (saving - self.running)
        rise = min(1.0, done / RAMP)
        goal = self.first + rise * (self.target + self.shift - self.first)
        lack = goal - saving
        self.multiplier = (self.multiplier + GAIN * (done - self.last) * lack).clamp(LEAST, MOST)
        self.last = torch.full_like(self.last, done)
        return (self.multiplier + PENALTY * lack).clamp(LEAST, MOST)

    def correct(self, saving: Tensor) -> None:
        """Takes into account what is saved in evaluation."""
        if not self.running.isnan():
            self.shift = self.running - saving.to(self.running.device)
