"""Residual networks: He et al.'s for CIFAR, of any depth 6n+2, and torchvision's for large images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from networks.backbones.pretrained import torchvision_model
from networks.chain import Chain, Gates, initialize
from networks.quantization import QuanConv, normalized_relu
from networks.skipping import Skippable, chosen, put


class ResidualBlock(Skippable):
    """``relu(shortcut(x) + gate * branch(x))``: with gate 1 a residual block, with gate 0 its shortcut alone.

    On an identity shortcut this is equation 3 of the Dual Dynamic Inference paper, since x is never negative there.

    Args:
        branch: the convolutions up to the addition, a BatchNorm last.
        shortcut: identity, or what brings x to the branch's shape.
        closing: in the place of the ReLU.
    """

    layers_name = "branch"

    def __init__(
        self,
        branch: nn.Sequential,
        shortcut: nn.Module,
        in_channels: int,
        out_channels: int,
        closing: nn.Module | None = None,
    ):
        super().__init__(in_channels, out_channels, gate_channels=out_channels, skippable=True)
        self.branch = branch
        self.shortcut = shortcut
        self.closing = closing
        self.raw = isinstance(closing, nn.Identity)

    def remainder(self, entered: Tensor) -> Tensor:
        return self.shortcut(entered)

    def mix(self, new: Tensor, remainder: Tensor, mask: Tensor | None) -> Tensor:
        return new + remainder if mask is None else torch.addcmul(remainder, new, mask)

    def join(self, entered: Tensor, mixed: Tensor) -> Tensor:
        return F.relu(mixed) if self.closing is None else self.closing(mixed)

    def skipped(self, entered: Tensor) -> Tensor:
        if self._keeps:
            return entered
        return super().skipped(entered)

    @property
    def _keeps(self) -> bool:
        """Whether the block gives its input when it is skipped."""
        identity = isinstance(self.shortcut, nn.Identity)
        return identity and (self.closing is None or isinstance(self.closing, nn.Identity))

    def for_some(self, entered: Tensor, some: Tensor, rows: Tensor, gates: Gates = Gates()) -> Tensor:
        if self._keeps:
            return put(entered, 0, rows, self.gated(some, gates))
        remainder = self.remainder(entered)
        mixed = self.mixed(some, chosen(remainder, rows), gates)
        return self.join(entered, put(remainder, 0, rows, mixed))

    @property
    def convs(self) -> list[nn.Conv2d]:
        return [layer for layer in self.branch if isinstance(layer, nn.Conv2d)]

    def quantized(self, weight_bits: int, act_bits: int, closes: bool = False) -> ResidualBlock:
        """``shortcut(x) + QuanConv(… QuanConv(x))``; the shortcut stays as it is."""
        branch = nn.Sequential(*(QuanConv(conv, weight_bits, act_bits) for conv in self.convs))
        closing = normalized_relu(self.out_channels) if closes else nn.Identity()
        return ResidualBlock(branch, self.shortcut, self.in_channels, self.out_channels, closing)

    def start_as_shortcut(self) -> None:
        """Sets the scale of the branch's last BatchNorm to zero, so that training starts without the branch."""
        norm = self.branch[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)


class PaddedShortcut(nn.Module):
    """Shortcut option A: every ``stride``-th pixel, missing channels filled with zeros. No parameters, no MACs."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        missing = out_channels - in_channels
        self.padding = (missing // 2, missing - missing // 2)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


def basic_block(in_channels: int, out_channels: int, stride: int = 1, shortcut: str = "A") -> ResidualBlock:
    """Two 3x3 convolutions with BatchNorm; ``shortcut`` is He et al.'s option A (free) or B (1x1 convolution).

    Raises:
        ValueError: any other option.
    """
    branch = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )
    if shortcut not in ("A", "B"):
        raise ValueError(f"Expected shortcut option A or B, got {shortcut!r}.")
    way: nn.Module = nn.Identity()
    if stride != 1 or in_channels != out_channels:
        way = PaddedShortcut(in_channels, out_channels, stride)
        if shortcut == "B":
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            way = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    return ResidualBlock(branch, way, in_channels, out_channels)


def cifar_resnet(
    depth: int,
    num_classes: int,
    input_shape: Sequence[int] = (3, 32, 32),
    shortcut: str = "A",
    widths: Sequence[int] = (16, 32, 64),
) -> Chain:
    """ResNet of ``depth`` = 6n+2 layers: a 3x3 stem and three stages of n basic blocks (He et al., section 4.2).

    Raises:
        ValueError: a depth that is not 6n+2, or an unknown shortcut option.
    """
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        lower = 6 * max(n, 1) + 2
        raise ValueError(f"A CIFAR ResNet has depth 6n+2, such as {lower} or {lower + 6}; got depth {depth}.")
    stem = nn.Sequential(
        nn.Conv2d(input_shape[0], widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
    )
    blocks = []
    channels = widths[0]
    for stage, width in enumerate(widths):
        for i in range(n):
            blocks.append(basic_block(channels, width, 2 if stage and i == 0 else 1, shortcut))
            channels = width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    chain = Chain(stem, blocks, head, [n] * len(widths), input_shape, num_classes)
    initialize(chain)
    return chain


def torchvision_resnet(
    model: str, num_classes: int, input_shape: Sequence[int] = (3, 224, 224), weights: str | None = None
) -> Chain:
    """One of torchvision's ResNets (``resnet18`` … ``resnet152``) as a chain; see ``torchvision_model``."""
    return chain_of_resnet(torchvision_model(model, num_classes, input_shape, weights, "conv1", "fc"), input_shape)


def chain_of_resnet(model: torchvision.models.ResNet, input_shape: Sequence[int]) -> Chain:
    """Regroups the modules of a torchvision ResNet, which they stay shared with, into a chain."""
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    blocks = [_residual_block(block) for stage in stages for block in stage]
    head = nn.Sequential(model.avgpool, nn.Flatten(), model.fc)
    return Chain(stem, blocks, head, [len(stage) for stage in stages], input_shape, model.fc.out_features)


def _residual_block(block: BasicBlock | Bottleneck) -> ResidualBlock:
    layers: list[nn.Module] = [block.conv1, block.bn1, nn.ReLU(inplace=True), block.conv2, block.bn2]
    if isinstance(block, Bottleneck):
        layers += [nn.ReLU(inplace=True), block.conv3, block.bn3]
    out_channels: int = (block.bn3 if isinstance(block, Bottleneck) else block.bn2).num_features
    return ResidualBlock(
        nn.Sequential(*layers), block.downsample or nn.Identity(), block.conv1.in_channels, out_channels
    )
