"""Trains a network with early exits: all exits jointly, or one at a time on a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.classifier import Classifier
from networks.early_exit_network import EarlyExitNetwork

# of the exits in order, by the number of exits, as printed in the papers
PUBLISHED: dict[str, dict[int, tuple[float, ...]]] = {
    "exit_predictor": {3: (0.2, 0.3, 0.5), 4: (0.2, 0.2, 0.2, 0.4)},
}
EARLY = 0.6  # hybrid-network paper, section III-B, of one early exit
PRESETS = ("auto", "sum", "mean", *PUBLISHED, "hybrid")


def loss_weights(preset: str | Sequence[float], exits: int) -> tuple[float, ...]:
    """The weight of each exit's cross-entropy.

    Args:
        preset: the weights themselves, or a name: ``exit_predictor`` (section V, three or four exits), ``hybrid`` (0.6
            for the early exit, or for all of them in equal parts, and 0.4 for the last; section III-B), ``sum`` (1
            each, equation 4 of Dual Dynamic Inference), ``mean`` (1/N each), ``auto`` (the Exit Predictor's where it
            has them, otherwise ``mean``).
        exits: number of exits N, the last included.

    Raises:
        ValueError: an unknown name, or weights for another number of exits.
    """
    if not isinstance(preset, str):
        weights = tuple(float(weight) for weight in preset)
        if len(weights) != exits or min(weights, default=0) < 0 or not any(weights):
            raise ValueError(f"Expected {exits} loss weights of at least 0, one an exit, got {list(weights)}.")
        return weights
    if preset not in PRESETS:
        raise ValueError(f"Expected loss_weights to be numbers or one of {', '.join(PRESETS)}; got {preset!r}.")
    mean = (1 / exits,) * exits
    if preset == "auto":
        return PUBLISHED["exit_predictor"].get(exits, mean)
    if preset == "hybrid" and exits > 1:
        return (*(EARLY / (exits - 1) for _ in range(exits - 1)), 1 - EARLY)
    named = {"mean": mean, "sum": (1.0,) * exits, "hybrid": (1.0,)}
    if preset in named:
        return named[preset]
    published = PUBLISHED[preset]
    if exits not in published:
        known = " or ".join(map(str, published))
        raise ValueError(
            f"loss_weights={preset} is published for {known} exits, this network has {exits}; use sum, mean or numbers."
        )
    return published[exits]


class Joint(Classifier):
    """All exits and the backbone at once: the weighted sum of the exits' cross-entropies.

    Equation 5 of the Exit Predictor paper and of the hybrid-network paper.

    Args:
        weights: of the exits, or the name of a preset of ``loss_weights``.
        options: of ``Classifier``.

    Raises:
        ValueError: weights for another number of exits.
    """

    def __init__(self, network: EarlyExitNetwork, weights: str | Sequence[float] = "auto", **options: Any):
        super().__init__(network, **options)
        self.weights = loss_weights(weights, network.num_exits)

    def loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        losses = [weight * F.cross_entropy(z, targets) for weight, z in zip(self.weights, logits, strict=True)]
        return torch.stack(losses).sum()


class OneExit(Classifier):
    """One early exit on the frozen rest (separate optimization, equation 4 of the hybrid-network paper).

    Args:
        exit: its number, from 1.
        options: of ``Classifier``.

    Raises:
        ValueError: no early exit of that number.
    """

    def __init__(self, network: EarlyExitNetwork, exit: int, **options: Any):
        if not 1 <= exit < network.num_exits:
            raise ValueError(f"Expected an early exit from 1 to {network.num_exits - 1}, got {exit}.")
        self.exit = exit
        super().__init__(network, **options)

    def trained(self) -> list[nn.Module]:
        return [self.network.heads[self.exit - 1]]

    def logits(self, images: Tensor) -> list[Tensor]:
        """Logits of this exit alone: the backbone runs no further than its tap."""
        with torch.no_grad():
            feature = self.network.chain.run(images, stop=self.network.taps[self.exit - 1])
        return [self.network.heads[self.exit - 1](feature)]

    def loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[0], targets)
