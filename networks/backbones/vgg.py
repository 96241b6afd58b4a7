"""VGG with BatchNorm (Simonyan and Zisserman), its classifier sized to the images."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from networks.chain import Block, Chain, Gates, initialize, require_size
from networks.quantization import QuanConv, normalized_relu

STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class ConvUnit(Block):
    """3x3 convolution, BatchNorm where ``norm`` (which replaces the bias), ReLU, and a pool that halves the map.

    There is no shortcut, so the unit cannot be skipped.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, norm: bool = True, pool: bool = False):
        super().__init__(in_channels, out_channels)
        self.norm = norm
        layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=not norm)]
        layers += [nn.BatchNorm2d(out_channels)] if norm else []
        layers += [nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, gates: Gates = Gates()) -> Tensor:
        """x (N, in_channels, h, w) to (N, out_channels, h', w')."""
        return self.layers(x)

    @property
    def convs(self) -> list[nn.Conv2d]:
        return [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]

    def quantized(self, weight_bits: int, act_bits: int, closes: bool = False) -> ConvUnit:
        """QuanConv, then the pool; the next unit's BatchNorm and quantizer are in the ReLU's place."""
        unit = copy.copy(self)
        unit._modules = dict(self._modules)  # else it would share the layers with this one
        pools = [layer for layer in self.layers if isinstance(layer, nn.MaxPool2d)]
        closing = [normalized_relu(self.out_channels)] if closes else []
        unit.layers = nn.Sequential(*(QuanConv(conv, weight_bits, act_bits) for conv in self.convs), *closing, *pools)
        unit.raw = not closes
        return unit


def vgg(depth: int, num_classes: int, input_shape: Sequence[int] = (3, 32, 32), dropout: float = 0.5) -> Chain:
    """VGG of ``depth`` 11, 13, 16 or 19 with BatchNorm; five pools, then 4096-4096-``num_classes``.

    Raises:
        ValueError: another depth, or images smaller than 32x32.
    """
    if depth not in STAGES:
        raise ValueError(f"Expected a VGG depth of {', '.join(map(str, STAGES))}, got {depth}.")
    require_size(f"vgg{depth}_bn", input_shape, 32)
    channels, height, width = input_shape
    blocks = []
    for stage in STAGES[depth]:
        for i, out_channels in enumerate(stage, start=1):
            blocks.append(ConvUnit(channels, out_channels, pool=i == len(stage)))
            channels = out_channels
    features = channels * (height // 32) * (width // 32)
    head = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(features, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout)),
        *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout)),
        nn.Linear(4096, num_classes),
    )
    lengths = [len(stage) for stage in STAGES[depth]]
    chain = Chain(nn.Identity(), blocks, head, lengths, input_shape, num_classes)
    initialize(chain)
    return chain
