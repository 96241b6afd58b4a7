"""AlexNet with the small kernels and strides that the Exit Predictor paper uses for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from networks.backbones.vgg import ConvUnit
from networks.chain import Chain, initialize, require_size


def alexnet(num_classes: int, input_shape: Sequence[int] = (3, 32, 32), dropout: float = 0.5) -> Chain:
    """Five 3x3 convolutions without BatchNorm, the first with stride 2, three pools, then 4096-4096-``num_classes``.

    Raises:
        ValueError: images smaller than 15x15.
    """
    require_size("alexnet", input_shape, 15)
    channels, height, width = input_shape
    blocks = [
        ConvUnit(channels, 64, stride=2, norm=False, pool=True),
        ConvUnit(64, 192, norm=False, pool=True),
        ConvUnit(192, 384, norm=False),
        ConvUnit(384, 256, norm=False),
        ConvUnit(256, 256, norm=False, pool=True),
    ]
    features = 256 * ((height + 1) // 2 // 8) * ((width + 1) // 2 // 8)
    head = nn.Sequential(
        nn.Flatten(),
        *(nn.Dropout(dropout), nn.Linear(features, 4096), nn.ReLU(inplace=True)),
        *(nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
        nn.Linear(4096, num_classes),
    )
    chain = Chain(nn.Identity(), blocks, head, [1, 1, 3], input_shape, num_classes)
    initialize(chain)
    return chain
