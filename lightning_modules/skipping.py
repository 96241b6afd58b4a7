"""Trains gates and the network that they skip in: warm-up, IADI and RADI of Dual Dynamic Inference (III-C, IV-A)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from costs.energy import EnergyModel, network_energy
from costs.network import network_costs
from lightning_modules.classifier import Batch, Classifier
from lightning_modules.pressure import Pressure
from networks.exits import EarlyExitNetwork, Gated
from networks.gates import Decisions

Resource = Literal["macs", "energy"]


class WarmUp(Classifier):
    """The gates alone, to a skip ratio of 0; the backbone and its BatchNorm statistics stay as they are.

    Each gate is brought to between one and two ``margin`` beyond its threshold: the sigmoid of a gate that is surer
    hardly passes a gradient, and what follows could not close it again; gates that were all alike would close all at
    once. Since nothing is to be skipped, gates look at what the whole network computes.

    Args:
        network: with gates.
        margin: before the sigmoid.
        options: of ``Classifier``.

    Raises:
        ValueError: a network without gates, or a margin that is not above 0.
    """

    asks_gates = True

    def __init__(self, network: EarlyExitNetwork, margin: float = 1.0, **options: Any):
        if network.gating is None:
            raise ValueError("Expected gates to train, there are none; choose method/gates=mgl2s.")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not margin > 0:
            raise ValueError(f"Expected the warm-up's margin above 0, got {margin}.")
        self.margin = margin
        self.gating = [network.gating]  # in a list, so that it is a part of the network alone
        super().__init__(network, **options)

    def trained(self) -> list[nn.Module]:
        return list(self.gating)

    def logits(self, images: Tensor) -> list[Tensor]:
        """All gates before the sigmoid, each (n, …)."""
        return self.network.gate_scores(images)

    def loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        """How far gates are from that range, squared, a mean over images and channels.

        Over the blocks it is a mean for a gate that they share, or its gradient would grow with the depth, and a sum
        for gates of their own.
        """
        lacks = [F.relu(self.margin - scores) + F.relu(scores - 2 * self.margin) for scores in logits]
        own = isinstance(self.gating[0].channel, nn.ModuleList)
        layer, channel = (
            [lack.square().mean() for lack in lacks if (lack.dim() > 1) == many] for many in (False, True)
        )
        parts = [torch.stack(layer).mean()] if layer else []
        if channel:
            parts.append(torch.stack(channel).sum() if own else torch.stack(channel).mean())
        return torch.stack(parts).sum()


class IADI(Classifier):
    """Backbone and gates jointly: L + α E (equation 5), L the cross-entropy of the last exit.

    E is what an image costs, in MFLOPs of 2 · MACs, gates included; in energy it is the share of the whole network's
    energy, times that network's MFLOPs, so that α weighs alike. Gates are 0 or 1 forward and pass the gradient of their
    sigmoid.

    Args:
        network: with gates.
        alpha: α, where ``target_saving`` is None; the papers' 2e-4 (CIFAR) and 4e-6 (ImageNet).
        target_saving: share of the backbone's resource that is to be saved, gates included; α follows the measured
            saving (``lightning_modules.pressure``).
        resource: ``macs`` or ``energy``, what E and the saving are counted in.
        chip: for energy.
        layer_lr: learning rate of the layer gates as a multiple of the backbone's. One recurrent gate decides for all
            blocks, and at the full rate all of them close before the backbone can follow.
        channel_lr: the same of the channel gates. The gradient of each is of a small part of a block; at the backbone's
            rate they hardly move.
        options: of ``Classifier``.

    Raises:
        ValueError: a network without gates; values outside their range; energy without a chip.
    """

    asks_gates = True

    def __init__(
        self,
        network: EarlyExitNetwork,
        alpha: float = 2e-4,
        target_saving: float | None = None,
        resource: Resource = "macs",
        chip: EnergyModel | None = None,
        layer_lr: float = 0.3,
        channel_lr: float = 10.0,
        **options: Any,
    ):
        if network.gating is None:
            raise ValueError("Expected gates to train, there are none; choose method/gates=mgl2s.")
        if resource not in ("macs", "energy") or (resource == "energy" and chip is None):
            raise ValueError(f"Expected method.resource to be macs, or energy with an energy model, got {resource}.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha >= 0:
            raise ValueError(f"Expected method.alpha to be a number of at least 0, got {alpha}.")
        for name, rate in (("layer_lr", layer_lr), ("channel_lr", channel_lr)):
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
                raise ValueError(f"Expected {name} of a phase with gates above 0, got {rate}.")
        self.gating, self.layer_lr, self.channel_lr = [network.gating], layer_lr, channel_lr
        super().__init__(network, **options)
        macs = network_costs(network)
        self.costs = macs if resource == "macs" or chip is None else network_energy(network, chip)
        self.mflops = 2e-6 * macs.plain
        self.alpha = alpha
        self.pressure = None if target_saving is None else Pressure(target_saving)

    def trained(self) -> list[nn.Module]:
        return [self.network.chain, *self.gating]

    def fresh_optimizer(self) -> Optimizer:
        gating = self.gating[0]
        parts: list[nn.Module | None] = [gating.layer, gating.channel]
        groups = [list(part.parameters()) for part in parts if part is not None]
        gates = {id(parameter) for group in groups for parameter in group}
        rest = [p for p in self.network.parameters() if p.requires_grad and id(p) not in gates]
        optimizer = self.make_optimizer([{"params": group} for group in (rest, *groups)])
        rates = [rate for rate, part in zip((self.layer_lr, self.channel_lr), parts, strict=True) if part is not None]
        for group, rate in zip(optimizer.param_groups[1:], rates, strict=True):
            group["lr"] *= rate
        return optimizer

    def logits(self, images: Tensor) -> Gated:
        return self.network.gated(images)

    def used(self, decisions: Decisions) -> Tensor:
        """Share of the backbone's resource that n images use, their average; above 1 where gates cost more than they
        save."""
        way = self.costs.of_segments(decisions).sum(0) + self.costs.heads[-1]
        return way.mean() / self.costs.plain

    def prediction_loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        """L of equation 5."""
        return F.cross_entropy(logits[-1], targets)

    def loss(self, logits: Gated, targets: Tensor) -> Tensor:
        used = self.used(logits.decisions)
        saving = 1 - used.detach()
        alpha: Any = self.alpha
        if self.pressure is not None:
            alpha = self.pressure(self._of_all(saving), self._done()) / self.mflops
        for name, value in (("saving", saving), ("alpha", alpha), ("skip_ratio", 1 - logits.decisions.runs.mean())):
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=len(targets), sync_dist=True)
        return self.prediction_loss(logits.logits, targets) + alpha * self.mflops * used

    def _of_all(self, saving: Tensor) -> Tensor:
        return saving if self._trainer is None else self.trainer.strategy.reduce(saving, reduce_op="mean")

    def _done(self) -> float:
        """Share of the phase's steps."""
        if self._trainer is None:
            return 1.0
        return self.trainer.global_step / max(1.0, float(self.trainer.estimated_stepping_batches))

    def on_validation_epoch_start(self) -> None:
        self.savings: list[Tensor] = []

    def _evaluated(self, batch: Batch) -> dict[str, Any]:
        known = super()._evaluated(batch)
        if self.pressure is not None and not self.trainer.testing:
            self.savings.append(1 - self.used(known["decisions"]).detach())
        return known

    def on_validation_epoch_end(self) -> None:
        if self.pressure is not None and self.savings:
            self.pressure.correct(self._of_all(torch.stack(self.savings).mean()))


class RADI(IADI):
    """All exits, backbone and gates end to end: the direct sum of the exits' cross-entropies (equation 4) + α E."""

    def trained(self) -> list[nn.Module]:
        return [self.network.chain, self.network.heads, *self.gating]

    def prediction_loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z, targets) for z in logits]).sum()
