"""The Exit Predictor: a tiny network that looks at the image first and says which early exits are worth computing.

Section III-B and figure 6 of the Exit Predictor paper, and the three architectures it is compared with in table II. The
paper leaves details of the layers open; these are the plainest that give its printed counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from networks.chain import as_shape, initialize, require_size

WIDTHS = (16, 32, 64, 128)
REDUCTION = 16  # of squeeze-and-excitation
HIDDEN = 64
MAP = 2  # pixels a side that the last feature is pooled to, where it is larger


class ExitPredictor(nn.Module):
    """Images to one prediction score an early exit.

    Args:
        layers: images (N, C, H, W) to z (N, early exits).
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to z (N, early exits), before the sigmoid (equation 8)."""
        return self.layers(images)

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to s (N, early exits), float32 from 0 to 1 (equation 7)."""
        return self(images).float().sigmoid()


class SqueezeExcitation(nn.Module):
    """Scales each channel by what all channels together say of it (Hu et al. 2018), with FC layers without bias."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = max(1, channels // REDUCTION)
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            *(nn.Linear(channels, squeezed, bias=False), nn.ReLU(inplace=True)),
            *(nn.Linear(squeezed, channels, bias=False), nn.Sigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x)[:, :, None, None]


class SeparableStage(nn.Module):
    """Depthwise 3x3 with stride 2 and pointwise 1x1; halves the map.

    Args:
        enriched: concatenate the max-pooled input with the depthwise output, then squeeze and excite both; without it
            the stage is that of the ablation "w/o Cat. & SE".
    """

    def __init__(self, in_channels: int, out_channels: int, enriched: bool = True):
        super().__init__()
        middle = 2 * in_channels if enriched else in_channels
        self.depthwise = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False),
            *(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)),
        )
        # an odd map is rounded up, as the convolution does
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if enriched else None
        self.excitation = SqueezeExcitation(middle) if enriched else nn.Identity()
        self.pointwise = nn.Sequential(
            nn.Conv2d(middle, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_channels, h, w) to (N, out_channels, ⌈h/2⌉, ⌈w/2⌉)."""
        out = self.depthwise(x)
        if self.pool is not None:
            out = torch.cat([self.pool(x), out], 1)
        return self.pointwise(self.excitation(out))


def separable(exits: int, input_shape: Sequence[int] = (3, 32, 32), enriched: bool = True) -> ExitPredictor:
    """The proposed network: a convolution with stride 2, three separable stages, two FC layers.

    Args:
        exits: N, the last included.
        input_shape: (C, H, W); a map still larger than 2x2 after the stages is pooled to that.
        enriched: with channel concatenation and squeeze-and-excitation.

    Raises:
        ValueError: no early exit, or images smaller than 16x16.
    """
    _require_early_exits(exits)
    require_size("The Exit Predictor", input_shape, 16)
    channels, height, width = as_shape(input_shape)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, WIDTHS[0], 3, 2, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)
    ]  # fmt: skip
    layers += [SeparableStage(a, b, enriched) for a, b in pairwise(WIDTHS)]
    sides = [math.ceil(side / 2 ** len(WIDTHS)) for side in (height, width)]
    if max(sides) > MAP:
        sides = [min(side, MAP) for side in sides]
        layers.append(nn.AdaptiveAvgPool2d(tuple(sides)))
    features = WIDTHS[-1] * sides[0] * sides[1]
    layers += [nn.Flatten(), nn.Linear(features, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, exits - 1)]
    return ExitPredictor(nn.Sequential(*layers))


def fcs_only(exits: int, input_shape: Sequence[int] = (3, 32, 32), hidden: int = 128) -> ExitPredictor:
    """Two FC layers on the pixels: the ablation "FCs only".

    Raises:
        ValueError: no early exit.
    """
    _require_early_exits(exits)
    first = nn.Linear(math.prod(as_shape(input_shape)), hidden)
    return ExitPredictor(nn.Sequential(nn.Flatten(), first, nn.ReLU(inplace=True), nn.Linear(hidden, exits - 1)))


def lenet(exits: int, input_shape: Sequence[int] = (3, 32, 32)) -> ExitPredictor:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pools: the ablation "LeNet".

    Raises:
        ValueError: no early exit, or images smaller than 16x16.
    """
    _require_early_exits(exits)
    require_size("LeNet", input_shape, 16)
    channels, *sides = as_shape(input_shape)
    height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
    return ExitPredictor(
        nn.Sequential(
            *(nn.Conv2d(channels, 6, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(inplace=True)),
            *(nn.Linear(120, 84), nn.ReLU(inplace=True), nn.Linear(84, exits - 1)),
        )
    )


def _require_early_exits(exits: int) -> None:
    if exits < 2:
        raise ValueError(f"Expected a network with an early exit for the Exit Predictor, got {exits} exit.")
