"""Trains the backbone with its own head alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.classifier import Classifier


class Plain(Classifier):
    """Cross-entropy of the last exit; early exits, if the network has any, are neither run nor trained."""

    def trained(self) -> list[nn.Module]:
        return [self.network.chain]

    def logits(self, images: Tensor) -> list[Tensor]:
        return [self.network.chain(images)]

    def loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[-1], targets)
