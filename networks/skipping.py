"""Blocks of which something remains when they are skipped: how they run for some images, and with some channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.chain import Block, Gates
from networks.quantization import QuanConv


class Skippable(Block):
    """``join(entered, mix(layers(entered), remainder(entered)))``, where ``entered = enter(x)``.

    What is entered and what remains is always computed; ``layers`` are what gates decide on. A layer gate of 0 leaves
    the remainder alone, a channel gate of 0 leaves it alone in that channel (equations 1 to 3 of Dual Dynamic
    Inference).
    """

    layers_name: str  # the attribute that holds the layers

    @property
    def layers(self) -> nn.Sequential:
        """What is skipped."""
        return getattr(self, self.layers_name)

    @property
    def entered_channels(self) -> int:
        """Channels of what ``enter`` gives."""
        return self.in_channels

    def enter(self, x: Tensor) -> Tensor:
        """x (N, in_channels, h, w) to the feature that gates look at and that the layers take."""
        return x

    def remainder(self, entered: Tensor) -> Tensor:
        """What the block gives in its gated channels when it is skipped."""
        raise NotImplementedError

    def mix(self, new: Tensor, remainder: Tensor, mask: Tensor | None) -> Tensor:
        """The layers' output and the remainder, by a mask of 1 (run) and 0 (skipped); None for 1."""
        raise NotImplementedError

    def join(self, entered: Tensor, mixed: Tensor) -> Tensor:
        """The block's output (N, out_channels, h', w')."""
        raise NotImplementedError

    def forward(self, x: Tensor, gates: Gates = Gates()) -> Tensor:
        """x (N, in_channels, h, w) to (N, out_channels, h', w'), multiplied by the gates."""
        return self.gated(self.enter(x), gates)

    def gated(self, entered: Tensor, gates: Gates = Gates()) -> Tensor:
        """The block from what is entered on, multiplied by the gates."""
        return self.join(entered, self.mixed(entered, self.remainder(entered), gates))

    def mixed(self, entered: Tensor, remainder: Tensor, gates: Gates) -> Tensor:
        """The layers run, and mixed with the remainder."""
        mask = gates.mask()
        if mask is None:
            return self.mix(self.layers(entered), remainder, None)
        x = entered
        last = last_conv(self.layers) if gates.inner else None
        for i, layer in enumerate(self.layers):
            x = layer(x * mask.to(x.dtype) if i == last else x)
        return self.mix(x, remainder, mask.to(x.dtype))  # in fp32 it would make fp32 of bf16

    def skipped(self, entered: Tensor) -> Tensor:
        """The block when its layers are not run."""
        return self.join(entered, self.remainder(entered))

    def for_some(self, entered: Tensor, some: Tensor, rows: Tensor, gates: Gates = Gates()) -> Tensor:
        """The block, its layers run for some images of the batch alone.

        Args:
            entered: may be overwritten.
            some: ``entered[rows]``.
            rows: (m,) where these images are.
            gates: of these images, (m, …).
        """
        raise NotImplementedError

    def with_channels(self, entered: Tensor, channels: Tensor, inner: bool = False) -> Tensor:
        """The block for one image, with some of the gated channels alone; the others are not computed.

        Args:
            entered: (1, c, h, w).
            channels: (m,) indices of those that run, at least one.
            inner: whether the layers inside have only these channels, too.
        """
        new = narrowed(self.layers, entered, channels, inner)
        remainder = self.remainder(entered)
        some = self.mix(new, remainder.index_select(1, channels), None)
        return self.join(entered, put(remainder.clone(), 1, channels, some))


def chosen(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` (m, c, h, w) in the memory format of x, which takes three times as long in channels_last."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x[rows]
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def put(into: Tensor, dim: int, index: Tensor, part: Tensor) -> Tensor:
    """Overwrites what is there, where it has the part's type; a part of few bits is in fp32, whatever autocast says."""
    dtype = torch.promote_types(into.dtype, part.dtype)
    return into.to(dtype).index_copy_(dim, index, part.to(dtype))


def last_conv(layers: nn.Sequential) -> int:
    """Where the last convolution is; from there on channels are the block's own."""
    return max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d | QuanConv))


def closes_inside(block: Skippable) -> bool:
    """Whether the mask of the block's output can close the channels inside as well: these are as many."""
    convs = [layer for layer in block.layers if isinstance(layer, nn.Conv2d)]
    few_bit = any(isinstance(layer, QuanConv) for layer in block.layers)
    return not few_bit and len(convs) > 1 and all(conv.out_channels == block.gate_channels for conv in convs)


def narrowed(layers: nn.Sequential, x: Tensor, channels: Tensor, inner: bool) -> Tensor:
    """The layers with some output channels alone, sliced out of the weights; quantized ones are run whole.

    Args:
        x: (1, c, h, w).
        channels: (m,) indices.
        inner: whether the layers before the last convolution have only these channels, too.
    """
    last = last_conv(layers)
    some: Tensor | None = None  # the channels that x has, None for all
    for i, layer in enumerate(layers):
        wanted = channels if inner or i >= last else None
        if isinstance(layer, nn.Conv2d):
            x, some = _narrow_conv(layer, x, wanted, some), wanted
        elif isinstance(layer, QuanConv):
            x, some = layer(x), None
        elif isinstance(layer, nn.BatchNorm2d) and some is not None:
            x = _narrow_norm(layer, x, some)
        else:
            x = layer(x)
    return x if some is not None else x.index_select(1, channels)


def _narrow_conv(conv: nn.Conv2d, x: Tensor, wanted: Tensor | None, some: Tensor | None) -> Tensor:
    weight, bias = conv.weight, conv.bias
    if wanted is not None:
        weight = weight.index_select(0, wanted)
        bias = None if bias is None else bias.index_select(0, wanted)
    if some is not None:
        weight = weight.index_select(1, some)
    padding: Any = conv.padding
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation)


def _narrow_norm(norm: nn.BatchNorm2d, x: Tensor, some: Tensor) -> Tensor:
    vectors: Any = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = torch.stack(vectors).index_select(1, some).unbind(0)
    return F.batch_norm(x, mean, var, weight, bias, eps=norm.eps)
