"""Trains the feature codec and the server behind it (section IV of the Exit Predictor paper)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.classifier import Classifier
from networks.early_exit_network import EarlyExitNetwork
from networks.feature_codec import FeatureCodec


class Server(Classifier):
    """The decoder and what follows the cut, behind the quantizer; the device and its encoder are frozen.

    Cross-entropy of the last exit: the third step of section IV.

    Raises:
        ValueError: a network without a codec.
    """

    def __init__(self, network: EarlyExitNetwork, **options: Any):
        if network.codec is None:
            raise ValueError("Expected a feature codec to train with, there is none; choose method/codec=bottlenet.")
        super().__init__(network, **options)

    @property
    def codec(self) -> FeatureCodec:
        codec = self.network.codec
        assert codec is not None
        return codec

    def trained(self) -> list[nn.Module]:
        chain = self.network.chain
        return [self.codec.decoder, *chain.blocks[self.codec.cut :], chain.head]

    def logits(self, images: Tensor) -> list[Tensor]:
        """Of the last exit alone: no early head is run."""
        with torch.no_grad():
            feature = self.network.chain.run(images, stop=self.codec.cut)
        return [self.network.on_server(self.codec(feature))]

    def loss(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[-1], targets)


class Codec(Server):
    """The codec, not quantized yet, with what follows the cut; the device is frozen (the second step)."""

    def trained(self) -> list[nn.Module]:
        return [self.codec.encoder, *super().trained()]
