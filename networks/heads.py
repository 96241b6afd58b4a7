"""Exit heads: small classifiers for the feature at a tap. Every one fits every tap of every backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from networks.backbones.resnet import ResidualBlock, basic_block
from networks.backbones.vgg import ConvUnit
from networks.chain import Block, Shape, initialize
from networks.quantization import normalized_relu


class Tap(NamedTuple):
    """Where a head is attached.

    Attributes:
        block: the block before the tap, None after the stem.
        shape: (channels, height, width) of the feature.
        exit: number of the exit, from 1.
        num_classes: number of logits the head gives.
    """

    block: nn.Module | None
    shape: Shape
    exit: int
    num_classes: int


Head = Callable[[Tap], nn.Module]


def light(tap: Tap) -> nn.Module:
    """Global average pool and one FC layer: the light classifier of Fig. 3 of the Exit Predictor paper."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(tap.shape[0], tap.num_classes))


def hybrid(tap: Tap) -> nn.Module:
    """Average pool 3 with stride 3 (a smaller map is pooled whole) and one FC layer: the hybrid-network paper's."""
    channels, height, width = tap.shape
    window = (min(3, height), min(3, width))
    features = channels * (height // window[0]) * (width // window[1])
    return nn.Sequential(nn.AvgPool2d(window), nn.Flatten(), nn.Linear(features, tap.num_classes))


def ddi(tap: Tap, target: int = 8) -> nn.Module:
    """Pooled convolutions down to a map of ``target`` pixels, one more, global average pool, FC.

    The Dual Dynamic Inference paper does not print its branch classifiers: these are [3x3, BN, ReLU, max pool 2] as
    long as the map is larger than ``target``, then [3x3, BN, ReLU], all as wide as the feature (section IV-A).
    """
    channels, height, width = tap.shape
    layers: list[nn.Module] = []
    while min(height, width) > target:
        layers.append(ConvUnit(channels, channels, pool=True))
        height, width = height // 2, width // 2
    layers.append(ConvUnit(channels, channels))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, tap.num_classes)]
    return nn.Sequential(*layers)


def exit_predictor(tap: Tap) -> nn.Module:
    """The Exit Predictor paper's classifiers (section V-A, tables III and IV), made of the backbone's own units.

    - residual blocks: two at exit 1, one at the later exits, then max pool 2 and FC;
    - convolutions with BatchNorm (VGG): one with stride 2 and full width, then two of half the width at exit 1 and one
      at the later exits, then FC; dense layers, which the paper does not treat, get the same;
    - convolutions without BatchNorm (AlexNet): two of width 64 at exit 1, one later, then max pool 2 and FC.
    """
    channels, height, width = tap.shape
    first = tap.exit == 1
    if isinstance(tap.block, ResidualBlock):
        units: list[Block] = [basic_block(channels, channels) for _ in range(2 if first else 1)]
        return _pooled(units, tap)
    if isinstance(tap.block, ConvUnit) and not tap.block.norm:
        units = [ConvUnit(channels, 64, norm=False), ConvUnit(64, 64, norm=False)]
        return _pooled(units if first else units[:1], tap)
    half = max(1, channels // 2)
    units = [ConvUnit(channels, channels, stride=2), ConvUnit(channels, half), ConvUnit(half, half)]
    features = half * ((height + 1) // 2) * ((width + 1) // 2)
    return nn.Sequential(*(units if first else units[:2]), nn.Flatten(), nn.Linear(features, tap.num_classes))


def _pooled(units: list[Block], tap: Tap) -> nn.Sequential:
    _, height, width = tap.shape
    window = (min(2, height), min(2, width))
    features = units[-1].out_channels * (height // window[0]) * (width // window[1])
    return nn.Sequential(*units, nn.MaxPool2d(window), nn.Flatten(), nn.Linear(features, tap.num_classes))


def build_head(head: Head, tap: Tap) -> nn.Module:
    """The head for a tap, its convolutions initialized as the backbone's are, its residual branches as zero.

    Inside a quantized part, whose blocks give raw sums, it begins with BatchNorm and ReLU.

    A residual head thus starts as its pool and FC; otherwise the first steps at the papers' rate of 0.1 can blow it up
    for good, since thousands of features meet in its FC.
    """
    module = head(tap)
    initialize(module)
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            block.start_as_shortcut()
    if isinstance(tap.block, Block) and tap.block.raw:
        return nn.Sequential(normalized_relu(tap.shape[0]), module)
    return module
