"""What every objective shares: the steps around a loss, the frozen rest of the network, the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from networks.early_exit_network import EarlyExitNetwork
from networks.quantization import quantized_convs

Batch = Sequence[Tensor]  # images (N, C, H, W), labels (N,), and what the data set knows besides
MakeOptimizer = Callable[..., Optimizer]


class Classifier(pl.LightningModule):
    """Trains a part of a network with early exits. A subclass defines ``loss`` and, if not all, ``trained``.

    What is not trained keeps its weights and its BatchNorm statistics. Gates are asked where ``asks_gates``; otherwise
    every block runs whole, in validation and test as well.

    Args:
        network: shared by all phases of a run.
        make_optimizer: takes the trained parameters.
        make_scheduler: takes the optimizer, and, if it has such parameters, ``total_steps`` and ``max_lr`` (the
            optimizer's rates); None for a constant rate.
        interval: ``step`` or ``epoch``, what the scheduler counts.
        coded: whether the last exit is asked behind the network's codec, in validation and test as well.
    """

    asks_gates = False

    def __init__(
        self,
        network: EarlyExitNetwork,
        make_optimizer: MakeOptimizer,
        make_scheduler: Callable[..., Any] | None = None,
        interval: str = "step",
        coded: bool = True,
    ):
        super().__init__()
        self.network, self.coded = network, coded
        self.make_optimizer, self.make_scheduler, self.interval = make_optimizer, make_scheduler, interval
        network.train()
        network.requires_grad_(False)
        for part in self.trained():
            part.requires_grad_(True)
        self.few_bit = list(quantized_convs(network).values())

    def trained(self) -> list[nn.Module]:
        """The parts this phase trains: by default the backbone and the heads."""
        return [self.network.chain, self.network.heads]

    def logits(self, images: Tensor) -> Any:
        """What the loss needs in training: by default the logits of every exit."""
        return self._whole(images)

    def _whole(self, images: Tensor) -> list[Tensor]:
        # the network's own call is what torch.compile takes
        if self.network.gating is None and (self.coded or self.network.codec is None):
            return self.network(images)
        return self.network.ungated(images, self.coded)

    def targets(self, batch: Batch) -> Tensor:
        """What the loss compares them with: by default the labels (N,)."""
        return batch[1]

    def loss(self, logits: Any, targets: Tensor) -> Tensor:
        """The objective for the logits (N, C) of the exits and labels (N,)."""
        raise NotImplementedError

    def on_train_epoch_start(self) -> None:
        self.network.eval()
        for part in self.trained():
            part.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(self.logits(batch[0]), self.targets(batch))
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        for conv in self.few_bit:
            conv.clip()

    def on_train_epoch_end(self) -> None:
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return self._evaluated(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return self._evaluated(batch)

    def _evaluated(self, batch: Batch) -> dict[str, Any]:
        images, labels = batch[:2]
        known: dict[str, Any] = {"labels": labels}
        if self.asks_gates and self.network.gating is not None:
            known["logits"], known["decisions"], _ = self.network.gated(images)
        else:
            known["logits"] = self._whole(images)
        return known if self.network.predictor is None else known | {"scores": self.network.predictor.scores(images)}

    def fresh_optimizer(self) -> Optimizer:
        """A fresh optimizer of the trained parameters."""
        return self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])

    def configure_optimizers(self) -> Any:
        optimizer = self.fresh_optimizer()
        length = self.trainer.max_epochs if self.interval == "epoch" else self.trainer.estimated_stepping_batches
        scheduler = self.fresh_scheduler(optimizer, max(1, int(length or 1)))
        return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": self.interval}])

    def fresh_scheduler(self, optimizer: Optimizer, total_steps: int) -> Any:
        """A fresh scheduler for a phase of ``total_steps`` steps or epochs, None for a constant rate."""
        if self.make_scheduler is None:
            return None
        known = {"total_steps": total_steps, "max_lr": [group["lr"] for group in optimizer.param_groups]}
        takes = inspect.signature(self.make_scheduler).parameters
        return self.make_scheduler(optimizer, **{name: value for name, value in known.items() if name in takes})


class Frozen(Classifier):
    """Trains nothing: for validation and test alone."""

    asks_gates = True

    def __init__(self, network: EarlyExitNetwork):
        super().__init__(network, make_optimizer=torch.optim.SGD)

    def trained(self) -> list[nn.Module]:
        return []
