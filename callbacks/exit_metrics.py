"""Accuracy of every exit, the share that leaves there under one confidence threshold, and what that costs."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Accuracy, MeanMetric, Metric

from costs.network import NetworkCosts, network_costs
from inference.thresholds import Confidence
from networks.exits import EarlyExitNetwork


class ExitMetrics(pl.Callback):
    """Logs, in validation and test (``val/…``, ``test/…``):

    - ``exit_k/acc``: accuracy of exit k on all samples;
    - ``exit_k/fraction``: share of the samples that leave at exit k;
    - ``acc``, ``macs``: accuracy, and average MACs per image, when every sample leaves at the first exit whose largest
      softmax probability is at least the threshold (equation 2 of the Exit Predictor paper).

    Args:
        confidence_threshold: λ, from 0 to 1, the same for every early exit.

    Raises:
        ValueError: a threshold outside 0 to 1.
    """

    def __init__(self, confidence_threshold: float = 0.95):
        if not 0 <= confidence_threshold <= 1:
            raise ValueError(f"Expected confidence_threshold from 0 to 1, got {confidence_threshold}.")
        self.threshold = confidence_threshold
        self.costs: dict[str, NetworkCosts] = {}
        self.metrics: dict[str, Metric] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        network = pl_module.network
        assert isinstance(network, EarlyExitNetwork)
        if not self.costs:
            self.costs = {name: network_costs(network, name) for name in ("macs", "ptflops")}
            exits = range(1, network.num_exits + 1)
            names = ["acc", *(f"exit_{k}/acc" for k in exits)]
            self.metrics.update({n: Accuracy("multiclass", num_classes=network.chain.num_classes) for n in names})
            self.metrics.update({f"exit_{k}/fraction": MeanMetric() for k in exits})
        for metric in self.metrics.values():
            metric.to(pl_module.device)

    def _update(self, logits: list[Tensor], labels: Tensor) -> None:
        stacked = torch.stack([z.float() for z in logits])
        exits = first_confident(stacked, self.threshold)
        chosen = stacked[exits, torch.arange(len(labels), device=labels.device)]
        self.metrics["acc"].update(chosen, labels)
        for k, z in enumerate(stacked):
            self.metrics[f"exit_{k + 1}/acc"].update(z, labels)
            self.metrics[f"exit_{k + 1}/fraction"].update((exits == k).float())

    def _log(self, pl_module: pl.LightningModule, split: str) -> None:
        values = {name: metric.compute() for name, metric in self.metrics.items()}
        shares = [values[f"exit_{k + 1}/fraction"].item() for k in range(len(self.costs["macs"].heads))]
        for convention, costs in self.costs.items():
            average = sum(share * cost for share, cost in zip(shares, costs.leaving, strict=True))
            values[convention] = self._exact(average)
            if split == "test":
                values |= {f"exit_{k}/{convention}": self._exact(c) for k, c in enumerate(costs.leaving, 1)}
        shown = ("acc", f"exit_{len(shares)}/acc")
        for name, value in values.items():
            pl_module.log(f"{split}/{name}", value, prog_bar=name in shown)
        for metric in self.metrics.values():
            metric.reset()

    def _exact(self, number: float) -> Tensor:
        # counts of a large network are beyond the 24 bits of fp32; Apple's GPU has no fp64
        device = self.metrics["acc"].device
        return torch.tensor(number, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:  # type: ignore[no-untyped-def]
        self._update(outputs["logits"], outputs["labels"])

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:  # type: ignore[no-untyped-def]
        self._update(outputs["logits"], outputs["labels"])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(pl_module, "test")


def first_confident(logits: Tensor, threshold: float) -> Tensor:
    """Where each sample leaves, counted from 0: the first exit with confidence ≥ ``threshold``, else the last.

    Args:
        logits: (exits, N, C).

    Returns:
        (N,) int64.
    """
    rule = Confidence()
    confident = rule.passes(rule.score(logits), threshold)
    confident[-1] = True
    return confident.int().argmax(0)
