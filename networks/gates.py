"""Gates: what decides, image by image, which blocks of a chain run, and which channels in them.

Dual Dynamic Inference, section III-A: the layer gate G^L is a recurrent network shared by all blocks, the channel gate
G^C a small convolutional network of its own for each block. Both look at what the block is about to take in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from networks.backbones.densenet import DenseLayer
from networks.chain import Block, Chain, Gates, initialize
from networks.gate_designs import HIDDEN, RecurrentGate, State, conv_gate, dense_gate
from networks.skipping import Skippable, closes_inside

STATES = ("layer_state", "channel_state")
RUNS = 0.0  # a gate runs from there on, before the sigmoid; after it, from one half


class Decisions(NamedTuple):
    """What the gates decided of n images in B blocks.

    Attributes:
        runs: (B, n), 1 where the block runs, 0 where it is skipped.
        channels: (B, n), how many of its gated channels run where it does; all where no gate closes any.
    """

    runs: Tensor
    channels: Tensor


class Gating(nn.Module):
    """The gates of a chain.

    Args:
        chain: all of its blocks can be skipped.
        layer: ``rnn`` for the layer gate; None for none.
        channel: ``cnn`` or ``rnn`` for the channel gates; None for none.
        mask: what channel gates close: ``output``, or ``both`` for the channels inside the block as well.
        hidden: units of the recurrent gates.

    Raises:
        ValueError: a chain with blocks that cannot be skipped, another design, ``both`` for blocks whose inner
            channels are others.
    """

    def __init__(
        self,
        chain: Chain,
        layer: str | None = "rnn",
        channel: str | None = "cnn",
        mask: str = "output",
        hidden: int = HIDDEN,
    ):
        super().__init__()
        blocks = _skippable(chain)
        _check(blocks, layer, channel, mask, hidden)
        widths = [block.entered_channels for block in blocks]
        outputs = [block.gate_channels for block in blocks]
        self.inner = mask == "both"
        self.layer = RecurrentGate(widths, [1], hidden) if layer else None
        self.channel: RecurrentGate | nn.ModuleList | None = None
        if channel == "rnn":
            self.channel = RecurrentGate(widths, outputs, hidden)
        elif channel == "cnn":
            self.channel = nn.ModuleList(map(_conv_gate_for, blocks))
        initialize(self)

    def begin(self, count: int, like: Tensor) -> GatePass:
        """The gates for so many images, where a tensor is."""
        return GatePass(self, count, like)


class GatePass:
    """The gates on their way along a chain with a batch of images; their state is in the open.

    Recurrent gates are computed in fp32, whatever ``torch.autocast`` says: their state should not gather rounding.

    Attributes:
        layer_state, channel_state: (n, hidden) and cell of each recurrent gate.

    Args:
        gating: of the chain.
        count: images n.
        like: a tensor where they are.
    """

    def __init__(self, gating: Gating, count: int, like: Tensor):
        self.gating = gating
        self.layer_state: State | None = None
        self.channel_state: State | None = None
        with _in_full_precision(like):
            if gating.layer is not None:
                self.layer_state, self.layer_folded = gating.layer.start(count, like), gating.layer.folded()
            if isinstance(gating.channel, RecurrentGate):
                self.channel_state, self.channel_folded = gating.channel.start(count, like), gating.channel.folded()

    def layer(self, entered: Tensor) -> Tensor | None:
        """The layer gate before the sigmoid (n,), at the block that takes this feature in; None without one."""
        gate = self.gating.layer
        if gate is None or self.layer_state is None:
            return None
        with _in_full_precision(entered):
            scores, self.layer_state = gate.step(entered, 1, self.layer_state, self.layer_folded)
        return scores[:, 0]

    def channels(self, i: int, entered: Tensor, outputs: int, rows: Tensor | None = None) -> Tensor | None:
        """The channel gate of block ``i`` before the sigmoid (n, outputs), None without one.

        Args:
            entered: of the images that run the block.
            rows: (m,) where they are; None for all. The state of the others stays.
        """
        gate = self.gating.channel
        if gate is None:
            return None
        if isinstance(gate, nn.ModuleList):
            return gate[i](entered).float()
        assert self.channel_state is not None
        with _in_full_precision(entered):
            before = self.channel_state
            state = before if rows is None else (before[0][rows], before[1][rows])
            scores, after = gate.step(entered, outputs, state, self.channel_folded)
            if rows is not None:
                after = (before[0].index_copy(0, rows, after[0]), before[1].index_copy(0, rows, after[1]))
            self.channel_state = after
        return scores

    def scores(self, i: int, entered: Tensor, outputs: int) -> list[Tensor]:
        """Both gates of block ``i`` before the sigmoid, those that there are."""
        return [score for score in (self.layer(entered), self.channels(i, entered, outputs)) if score is not None]

    def stay(self, runs: Tensor, before: State | None) -> None:
        """Gives the images that skipped a block the channel gate's state from before it."""
        if before is not None and self.channel_state is not None:
            ran, (state, cell) = runs[:, None] > 0, self.channel_state
            self.channel_state = torch.where(ran, state, before[0]), torch.where(ran, cell, before[1])

    def keep(self, rows: Tensor) -> None:
        """Goes on with these images alone."""
        self._set(lambda part: part[rows])

    def part(self, rows: slice) -> GatePass:
        """The same for some of the images, on their own from here on."""
        part = copy.copy(self)
        part._set(lambda state: state[rows])
        return part

    def rejoin(self, parts: Sequence[GatePass]) -> None:
        """Takes over the states of all parts, in their order."""
        for name in STATES:
            if getattr(self, name) is not None:
                setattr(self, name, tuple(map(torch.cat, zip(*(getattr(part, name) for part in parts), strict=True))))

    def _set(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in STATES:
            if (state := getattr(self, name)) is not None:
                setattr(self, name, tuple(map(change, state)))


def straight_through(scores: Tensor) -> Tensor:
    """Gates before the sigmoid to 0 or 1; backward as the sigmoid."""
    soft = scores.sigmoid()
    return (scores >= RUNS).to(soft.dtype) + (soft - soft.detach())


class Multiplied:
    """A batch on its way through gated blocks in training: everything is computed, and multiplied by the gates.

    Attributes:
        scores: of all gates so far before the sigmoid, each (n, …).

    Args:
        gating: of the chain.
        x: the feature (n, c, h, w) at tap 0.
    """

    def __init__(self, gating: Gating, x: Tensor):
        self.gates = gating.begin(len(x), x)
        self.scores: list[Tensor] = []
        self.runs: list[Tensor] = []
        self.channels: list[Tensor] = []

    def step(self, i: int, block: Skippable, x: Tensor) -> Tensor:
        """Block ``i``: its input to its output."""
        entered = block.enter(x)
        before = self.gates.channel_state
        layer = self.gates.layer(entered)
        channel = self.gates.channels(i, entered, block.gate_channels)
        self.scores += [score for score in (layer, channel) if score is not None]
        runs = None if layer is None else straight_through(layer)
        if runs is not None:
            self.gates.stay(runs, before)
        kept = None if channel is None else straight_through(channel)
        ones = torch.ones(len(x), device=x.device)
        self.runs.append(ones if runs is None else runs)
        self.channels.append(block.gate_channels * ones if kept is None else kept.sum(1))
        return block.gated(entered, Gates(runs, kept, self.gates.gating.inner))

    @property
    def decisions(self) -> Decisions:
        """Of the blocks so far; differentiable."""
        return Decisions(torch.stack(self.runs), torch.stack(self.channels))


def gating(
    chain: Chain,
    layer: str | None = None,
    channel: str | None = None,
    mask: str = "output",
    hidden: int = HIDDEN,
) -> Gating | None:
    """The gates of a chain, None where neither layers nor channels are gated; see ``Gating``."""
    return Gating(chain, layer, channel, mask, hidden) if layer or channel else None


def _in_full_precision(like: Tensor) -> AbstractContextManager[Any]:
    kind = like.device.type
    # entering a context takes as long as the gate itself
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _skippable(chain: Chain) -> list[Skippable]:
    found: list[Skippable] = []
    for block in chain.blocks:
        if not isinstance(block, Skippable):
            raise ValueError(
                "Gates need a backbone whose blocks have a shortcut, or nothing would remain of a skipped one; the "
                f"blocks of this backbone ({type(block).__name__}) have none: choose a resnet or densenet, or "
                "another method, such as early_exit."
            )
        found.append(block)
    return found


def _check(blocks: Sequence[Skippable], layer: str | None, channel: str | None, mask: str, hidden: int) -> None:
    for name, value, known in (("layer", layer, ("rnn",)), ("channel", channel, ("cnn", "rnn"))):
        if value is not None and value not in known:
            raise ValueError(f"Expected method.gates.{name} to be {' or '.join(known)}, or null, got {value}.")
    if mask not in ("output", "both"):
        raise ValueError(f"Expected method.gates.mask to be output or both, got {mask}.")
    if type(hidden) is not int or hidden < 1:
        raise ValueError(f"Expected method.gates.hidden to be a whole number of at least 1, got {hidden}.")
    if mask == "both" and not all(map(closes_inside, blocks)):
        raise ValueError(
            "method.gates.mask=both needs blocks in full precision whose convolutions are all as wide as their output, "
            "as those of the CIFAR ResNets; choose mask=output."
        )


def _conv_gate_for(block: Block) -> nn.Sequential:
    assert isinstance(block, Skippable)
    make = dense_gate if isinstance(block, DenseLayer) else conv_gate
    return make(block.entered_channels, block.gate_channels)
