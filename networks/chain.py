"""A backbone as a chain: stem, blocks, head, the one shape everything else attaches to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class BlockInfo:
    """What the parts attached to a block need to know of it.

    Attributes:
        stage: number of its stage, from 0; the blocks of a stage share one resolution.
        index: number of the block in the whole chain, from 0.
        in_channels, out_channels: of the feature that comes in and goes out.
        gate_channels: channels a channel gate decides on, 0 where it has none.
        skippable: whether something remains when the block is skipped.
    """

    stage: int
    index: int
    in_channels: int
    out_channels: int
    gate_channels: int
    skippable: bool


class Gates(NamedTuple):
    """Decisions for one block: ``layer`` (N,) and ``channel`` (N, gate_channels), 1 runs and 0 skips.

    ``inner`` says whether the channel decisions close the channels inside the block, too.
    """

    layer: Tensor | None = None
    channel: Tensor | None = None
    inner: bool = False

    def mask(self) -> Tensor | None:
        """Both decisions as one factor (N, 1 or gate_channels, 1, 1); None where neither is given."""
        layer = None if self.layer is None else self.layer[:, None, None, None]
        channel = None if self.channel is None else self.channel[:, :, None, None]
        if layer is None or channel is None:
            return channel if layer is None else layer
        return layer * channel


class Block(nn.Module):
    """The smallest part an exit can follow and a gate can skip.

    Subclasses define ``forward(x, gates)``, and ``convs`` and ``quantized`` where there is a form of few bits.
    """

    def __init__(self, in_channels: int, out_channels: int, gate_channels: int = 0, skippable: bool = False):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.gate_channels = gate_channels
        self.skippable = skippable
        self.raw = False  # whether whoever reads its output has to normalize it first

    @property
    def signed(self) -> bool:
        """Whether its output has negative numbers."""
        return self.raw

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Its convolutions that a quantized block has in few bits: all but those of shortcuts and transitions."""
        return []

    def quantized(self, weight_bits: int, act_bits: int, closes: bool = False) -> Block:
        """The pre-activation block with ``convs`` as ``networks.quantization.QuanConv``, which share their weights.

        Args:
            weight_bits, act_bits: 1 to 8, or 32.
            closes: whether it ends with BatchNorm and ReLU where its output is raw without, as a pre-activation
                network does (He et al., Identity Mappings in Deep Residual Networks).

        Raises:
            ValueError: other bits; a block without such a form.
        """
        raise ValueError(f"{type(self).__name__} has no form of few bits.")


class Chain(nn.Module):
    """Stem, blocks and head of a classifier.

    A *tap* is a place between blocks: tap k lies after k blocks, so tap 0 follows the stem.

    Args:
        stem: image (N, C, H, W) to the first feature.
        blocks: in order; each takes and gives a feature (N, channels, h, w).
        head: last feature to logits (N, num_classes).
        stage_lengths: number of blocks of each stage; they add up to the number of blocks.
        input_shape: (C, H, W) of the images the chain was built for.
        num_classes: number of logits.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        head: nn.Module,
        stage_lengths: Sequence[int],
        input_shape: Sequence[int],
        num_classes: int,
    ):
        super().__init__()
        if sum(stage_lengths) != len(blocks):
            raise ValueError(f"Expected stage_lengths that add up to {len(blocks)} blocks, got {tuple(stage_lengths)}.")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.stage_lengths = tuple(stage_lengths)
        self.input_shape: Shape = as_shape(input_shape)
        self.num_classes = num_classes
        stages = [stage for stage, length in enumerate(stage_lengths) for _ in range(length)]
        self.info = tuple(
            BlockInfo(stage, i, block.in_channels, block.out_channels, block.gate_channels, block.skippable)
            for i, (stage, block) in enumerate(zip(stages, blocks, strict=True))
        )

    def step(self, i: int, x: Tensor, gates: Gates = Gates()) -> Tensor:
        """Runs block ``i`` (from 0). With gates its output is multiplied by them; execution really skips elsewhere.

        Raises:
            ValueError: gates were given for a block that cannot be skipped.
        """
        if not self.info[i].skippable and gates.mask() is not None:
            raise ValueError(f"Block {i} has no shortcut: nothing would remain of it when skipped.")
        return self.blocks[i](x, gates)

    def run(self, x: Tensor, start: int | None = None, stop: int | None = None) -> Tensor:
        """Runs the part between two taps.

        Args:
            x: the image (N, C, H, W) when ``start`` is None, otherwise the feature at tap ``start``.
            start: tap to go on from, 0 to the number of blocks.
            stop: tap to end at; None runs the head too and gives logits (N, num_classes).
        """
        x = self.stem(x) if start is None else x
        for i in range(start or 0, len(self.blocks) if stop is None else stop):
            x = self.step(i, x)
        return self.head(x) if stop is None else x

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        return self.run(x)

    def tap_shapes(self) -> tuple[Shape, ...]:
        """(channels, height, width) of the feature at every tap, the one after the stem first."""
        chain = copy.deepcopy(self).to("meta").eval()
        x = chain.stem(torch.empty(1, *self.input_shape, device="meta"))
        shapes = [as_shape(x.shape[1:])]
        for i in range(len(self.blocks)):
            x = chain.step(i, x)
            shapes.append(as_shape(x.shape[1:]))
        return tuple(shapes)


def as_shape(sizes: Sequence[int]) -> Shape:
    """Checks and freezes (channels, height, width)."""
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"Expected (channels, height, width), each at least 1, got {tuple(sizes)}.")
    channels, height, width = (int(size) for size in sizes)
    return channels, height, width


def require_size(backbone: str, input_shape: Sequence[int], smallest: int) -> None:
    """Refuses images smaller than ``smallest`` pixels a side, which a backbone's pooling would use up."""
    _, height, width = as_shape(input_shape)
    if min(height, width) < smallest:
        raise ValueError(
            f"{backbone} needs images of at least {smallest}x{smallest} pixels, got {height}x{width}; "
            "enlarge the images or choose a backbone that pools less."
        )


def initialize(module: nn.Module) -> None:
    """He initialization of every convolution (normal, fan out), as the ResNet and VGG papers train with."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
