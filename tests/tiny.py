"""A network without BatchNorm and dropout: there the gradient of a batch is the mean of its images' gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from networks.backbones.vgg import ConvUnit
from networks.chain import Chain, initialize


def tiny(num_classes: int, input_shape: Sequence[int] = (3, 32, 32)) -> Chain:
    """Three convolutions."""
    blocks = [
        ConvUnit(input_shape[0], 8, norm=False, pool=True),
        ConvUnit(8, 12, norm=False),
        ConvUnit(12, 12, norm=False),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes))
    chain = Chain(nn.Identity(), blocks, head, [1, 2], input_shape, num_classes)
    initialize(chain)
    return chain
