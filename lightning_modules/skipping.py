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
from networks.early_exit_network import EarlyExitNetwork, Gated
from networks.gate_designs import RecurrentGate
from networks.gates import Decisions

Resource = Literal["macs", "energy"]
NO_GATES = "Expected gates to train, there are none; choose method/gates=mgl2s, or method=early_exit or plain."


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
            raise ValueError(NO_GATES)
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
        recurrent_lr: learning rate of recurrent gates as a multiple of the backbone's. One of them decides for all
            blocks, and at the full rate all close before the backbone can follow.
        conv_lr: the same of the channel gates of single blocks. The gradient of each channel is of a small part of a
            block; at the backbone's rate they hardly move.
        options: of ``Classifier``.

    Raises:
        ValueError: a network without gates; values outside their range; energy without a chip.
    """

    asks_gates = True
    all_exits = False  # whether the early exits are trained, too

    def __init__(
        self,
        network: EarlyExitNetwork,
        alpha: float = 2e-4,
        target_saving: float | None = None,
        resource: Resource = "macs",
        chip: EnergyModel | None = None,
        recurrent_lr: float = 0.3,
        conv_lr: float = 10.0,
        **options: Any,
    ):
        if network.gating is None:
            raise ValueError(NO_GATES)
        if resource not in ("macs", "energy") or (resource == "energy" and chip is None):
            raise ValueError(f"Expected method.resource to be macs, or energy with an energy model, got {resource}.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha >= 0:
            raise ValueError(f"Expected method.alpha to be a number of at least 0, got {alpha}.")
        for name, rate in (("recurrent_lr", recurrent_lr), ("conv_lr", conv_lr)):
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
                raise ValueError(f"Expected {name} of a phase with gates above 0, got {rate}.")
        self.gating, self.recurrent_lr, self.conv_lr = [network.gating], recurrent_lr, conv_lr
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
        parts = [part for part in (gating.layer, gating.channel) if part is not None]
        groups = [list(part.parameters()) for part in parts]
        gates = {id(parameter) for group in groups for parameter in group}
        rest = [p for p in self.network.parameters() if p.requires_grad and id(p) not in gates]
        optimizer = self.make_optimizer([{"params": group} for group in (rest, *groups)])
        for part, group in zip(parts, optimizer.param_groups[1:], strict=True):
            group["lr"] *= self.recurrent_lr if isinstance(part, RecurrentGate) else self.conv_lr
        return optimizer

    def logits(self, images: Tensor) -> Gated:
        return self.network.gated(images, heads=self.all_exits)

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
        kind = "saving" if self.costs.convention == "macs" else "energy_saving"
        for name, value in ((kind, saving), ("alpha", alpha), ("skip_ratio", 1 - logits.decisions.runs.mean())):
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
        self.saved = torch.zeros(2, device=self.device)  # sum over the images, and how many

    def _evaluated(self, batch: Batch) -> dict[str, Any]:
        known = super()._evaluated(batch)
        if not self.trainer.testing:
            saving, count = 1 - self.used(known["decisions"]).detach(), len(batch[1])
            self.saved += torch.stack([saving * count, saving.new_tensor(count)]).to(self.saved.dtype)
        return known

    def on_validation_epoch_end(self) -> None:
        if self.pressure is not None:
            total, count = self._of_all(self.saved)
            if count > 0:
                self.pressure.correct(total / count)


class RADI(IADI):
    """All exits, backbone and gates end to end: the direct sum of the exits' cross-entropies (equation 4) + α E."""

    all_exits = True

    def trained(self) -> list[nn.Module]:
        return [self.network.chain, self.network.heads, *self.gating]

    def prediction_loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z, targets) for z in logits]).sum()
