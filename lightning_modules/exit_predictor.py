"""Trains the Exit Predictor to imitate which early exits of a frozen network are confident."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from datamodules.image_data import ImageData
from inference.thresholds import Thresholds
from lightning_modules.classifier import Batch, Classifier
from networks.early_exit_network import EarlyExitNetwork


class Distillation(Classifier):
    """The Exit Predictor on labels u(c_n - λ_n): whether exit n of the frozen network is confident (equations 6 to 9).

    The network is in eval mode. Where images are augmented it sees the predictor's batch; where they are not, what it
    says of the training images is computed once.

    Logs in validation and test, of each early exit k: ``exit_k/label_balance``, the share of images it is confident of;
    ``exit_k/predictor_auroc`` (left out where all labels are one); ``exit_k/predictor_acc``, of scores ≥ 1/2.

    Args:
        network: with a predictor.
        policy: gives λ.
        options: of ``Classifier``.

    Raises:
        ValueError: a network without a predictor.
    """

    def __init__(self, network: EarlyExitNetwork, policy: Thresholds, **options: Any):
        if network.predictor is None:
            raise ValueError("Expected an Exit Predictor to train, there is none; choose method/predictor=proposed.")
        self.predictor = [network.predictor]  # in a list, so that it is a part of the network alone
        super().__init__(network, **options)
        self.policy = policy
        self.balance = nn.ModuleList(MeanMetric() for _ in network.taps)
        self.quality = nn.ModuleList(
            MetricCollection({"predictor_auroc": BinaryAUROC(), "predictor_acc": BinaryAccuracy()})
            for _ in network.taps
        )
        self.computed_once = False

    def trained(self) -> list[nn.Module]:
        return list(self.predictor)

    def logits(self, images: Tensor) -> list[Tensor]:
        """z (N, early exits) of the predictor (equation 8)."""
        return [self.predictor[0](images).float()]

    @torch.no_grad()
    def imitated(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to the labels (N, early exits): 1 where an exit's confidence reaches λ (equation 9)."""
        logits, _ = self.network.on_device(images)
        return self._confident([z.float() for z in logits])

    def _confident(self, logits: list[Tensor]) -> Tensor:
        thresholds = self.policy.each(self.network.num_exits)
        passed = [self.policy.passes(self.policy.score(z), t) for z, t in zip(logits, thresholds, strict=True)]
        return torch.stack(passed, 1).float()

    def targets(self, batch: Batch) -> Tensor:
        return batch[-1] if self.computed_once else self.imitated(batch[0])

    def loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the exits, averaged over the batch (equation 6)."""
        return F.binary_cross_entropy_with_logits(logits[0], targets, reduction="none").sum(1).mean()

    def on_fit_start(self) -> None:
        data = self._data
        if data.augments:
            return
        self.network.eval()
        assert data.splits is not None
        images: Any = data.splits.train
        with self.trainer.precision_plugin.forward_context():
            parts = [
                self.imitated(data.normalize(part.to(self.device))).cpu()
                for part in images.tensors[0].split(data.eval_batch_size)
            ]
        self.network.train()  # Lightning warns of what begins in eval mode
        data.annotate(torch.cat(parts))
        self.computed_once = True

    def on_fit_end(self) -> None:
        if self.computed_once:
            self._data.annotate(None)
            self.computed_once = False

    @property
    def _data(self) -> ImageData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageData)
        return data

    def _evaluated(self, batch: Batch) -> dict[str, Any]:
        known = super()._evaluated(batch)
        truth = self._confident([z.float() for z in known["logits"][:-1]])
        for balance, quality, score, label in zip(self.balance, self.quality, known["scores"].T, truth.T, strict=True):
            balance(label)
            quality.update(score, label.int())  # type: ignore[operator]
        return known

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        parts: Any = zip(self.balance, self.quality, strict=True)
        for k, (balance, quality) in enumerate(parts, start=1):
            share = balance.compute()
            self.log(f"{split}/exit_{k}/label_balance", share)
            for name, metric in quality.items():
                if name != "predictor_auroc" or 0 < share < 1:
                    self.log(f"{split}/exit_{k}/{name}", metric.compute())
            balance.reset()
            quality.reset()
