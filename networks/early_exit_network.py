"""A chain with early exits: the network that everything else takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from networks.chain import Chain
from networks.exit_predictor import ExitPredictor
from networks.exits import checked_taps
from networks.feature_codec import FeatureCodec
from networks.gates import Decisions, Gating, Multiplied
from networks.heads import Head, Tap, build_head


class Gated(NamedTuple):
    """What a network with gates says of n images, everything computed.

    Attributes:
        logits: of every exit, each (n, num_classes).
        decisions: of its gates.
        scores: of all gates before the sigmoid, each (n, …).
    """

    logits: list[Tensor]
    decisions: Decisions
    scores: list[Tensor]


class EarlyExitNetwork(nn.Module):
    """A chain with classifiers at some of its taps. Exits are numbered from 1; exit N is the chain's own head.

    Args:
        chain: the backbone.
        taps: rising; tap k lies after k blocks.
        heads: one for each tap, feature (N, c, h, w) to logits (N, num_classes).
        predictor: says from the image which early exits are worth computing; None for none.
        gating: decides which blocks and channels of the chain run; None for all.
        codec: compresses the feature at its cut, which no early exit lies behind; None to send it as it is.

    Raises:
        ValueError: taps, heads, a predictor or a codec that do not go together.
    """

    def __init__(
        self,
        chain: Chain,
        taps: Sequence[int] = (),
        heads: Sequence[nn.Module] = (),
        predictor: ExitPredictor | None = None,
        gating: Gating | None = None,
        codec: FeatureCodec | None = None,
    ):
        super().__init__()
        self.chain = chain
        self.taps = checked_taps(taps, len(chain.blocks))
        if len(heads) != len(taps):
            raise ValueError(f"Expected a head for each of {len(taps)} taps, got {len(heads)}.")
        if predictor is not None and not taps:
            raise ValueError("Expected an early exit for the Exit Predictor, got none.")
        if codec is not None and gating is not None:
            raise ValueError("Expected a network with gates or with a feature codec, got both.")
        if codec is not None and not max(self.taps, default=1) <= codec.cut <= len(chain.blocks):
            raise ValueError(f"Expected a cut at or behind the last early exit, got tap {codec.cut}.")
        self.heads = nn.ModuleList(heads)
        self.predictor = predictor
        self.gating = gating
        self.codec = codec

    @property
    def num_exits(self) -> int:
        """The early exits and the last."""
        return len(self.taps) + 1

    @property
    def cut(self) -> int | None:
        """The tap after which the device ends: the codec's, or that of the last early exit; None where neither is."""
        if self.codec is not None:
            return self.codec.cut
        return self.taps[-1] if self.taps else None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) to the logits (N, num_classes) of every exit, computed in one pass.

        Gates multiply; the predictor is not asked.
        """
        return self.ungated(x) if self.gating is None else self.gated(x).logits

    def gated(self, x: Tensor, heads: bool = True) -> Gated:
        """The same with what the gates decided.

        Args:
            heads: whether the early exits' logits are computed, too.

        Raises:
            ValueError: a network without gates.
        """
        if self.gating is None:
            raise ValueError("Expected a network with gates, got one without.")
        x = self.chain.run(x, stop=0)
        way = Multiplied(self.gating, x)
        exits = dict(zip(self.taps, self.heads, strict=True)) if heads else {}
        logits = []
        blocks: Any = self.chain.blocks
        for i, block in enumerate(blocks):
            x = way.step(i, block, x)
            if i + 1 in exits:
                logits.append(exits[i + 1](x))
        return Gated([*logits, self.chain.head(x)], way.decisions, way.scores)

    def gate_scores(self, x: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) to all gates before the sigmoid, each (N, …), at blocks that all run whole.

        No gradient reaches the backbone.
        """
        assert self.gating is not None
        with torch.no_grad():
            x = self.chain.run(x, stop=0)
        gates, scores = self.gating.begin(len(x), x), []
        blocks: Any = self.chain.blocks
        for i, block in enumerate(blocks):
            with torch.no_grad():
                entered = block.enter(x)
                x = block.gated(entered)
            scores += gates.scores(i, entered, block.gate_channels)
        return scores

    def ungated(self, x: Tensor, coded: bool = True) -> list[Tensor]:
        """The same with every block run whole.

        Args:
            coded: whether what the server goes on with has been through the codec, if there is one.
        """
        logits, feature = self.on_device(x)
        return [*logits, self.on_server(self.codec(feature) if coded and self.codec is not None else feature)]

    def without_gates(self) -> EarlyExitNetwork:
        """The same backbone, heads, predictor and codec, shared, without gates."""
        return EarlyExitNetwork(self.chain, self.taps, list(self.heads), self.predictor, codec=self.codec)

    def on_device(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (N, C, H, W) to the logits (N, num_classes) of the early exits, and the feature at the cut.

        No gate is asked, nothing is encoded. Without a cut the feature is that of tap 0.
        """
        logits = []
        x = self.chain.run(x, stop=0)
        start = 0
        for tap, head in zip(self.taps, self.heads, strict=True):
            x = self.chain.run(x, start, tap)
            logits.append(head(x))
            start = tap
        return logits, self.chain.run(x, start, self.cut or 0)

    def on_server(self, feature: Tensor) -> Tensor:
        """What follows the cut: a feature (N, c, h, w), decoded, to the logits (N, num_classes) of the last exit."""
        return self.chain.run(feature, self.cut or 0)


def with_exits(
    chain: Chain,
    taps: Sequence[int],
    head: Head,
    predictor: Callable[..., ExitPredictor] | None = None,
    gating: Gating | None = None,
    codec: FeatureCodec | None = None,
) -> EarlyExitNetwork:
    """Attaches a head of one kind to each tap.

    Args:
        predictor: makes one from the number of exits and ``input_shape``.
        gating, codec: of the chain.

    Raises:
        ValueError: a tap twice or outside the chain; a predictor for no early exit.
    """
    taps = checked_taps(taps, len(chain.blocks))
    shapes = chain.tap_shapes() if taps else ()
    heads = [
        build_head(head, Tap(chain.blocks[tap - 1], shapes[tap], exit, chain.num_classes))
        for exit, tap in enumerate(taps, start=1)
    ]
    guide = None if predictor is None else predictor(len(taps) + 1, input_shape=chain.input_shape)
    return EarlyExitNetwork(chain, taps, heads, guide, gating, codec)


class _Unanswered(nn.Module):
    """Stands where the server would answer: zeros for logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, feature: Tensor) -> Tensor:
        return feature.new_zeros(len(feature), self.num_classes)


def device_part(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """What a device runs: everything before the cut, its modules shared, the encoder for what is sent.

    Exit N answers with zeros at no cost.

    Raises:
        ValueError: a network without an early exit or a codec, which has no cut; one with gates.
    """
    if network.cut is None:
        raise ValueError("Expected a network with an early exit or a codec, got neither: it has no cut.")
    if network.gating is not None:
        raise ValueError("Expected a network without gates.")
    chain, cut = network.chain, network.cut
    stages = [info.stage for info in chain.info[:cut]]
    lengths = [stages.count(stage) for stage in dict.fromkeys(stages)]
    head: nn.Module = _Unanswered(chain.num_classes)
    if network.codec is not None:
        head = nn.Sequential(network.codec.encoder, head)
    blocks: list[Any] = list(chain.blocks)[:cut]
    front = Chain(chain.stem, blocks, head, lengths, chain.input_shape, chain.num_classes)
    return EarlyExitNetwork(front, network.taps, list(network.heads), network.predictor)
