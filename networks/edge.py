"""The edge of a hybrid network: the first convolutions of the blocks, in few bits, and exits along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from networks.chain import Block, Chain
from networks.quantization import check_bits


def quantizable(chain: Chain) -> tuple[int, ...]:
    """Convolutions of each block that can be quantized; none of the network's first layer, which stays in fp32.

    That is the stem, and where that computes nothing, the first block.
    """
    first = 0 if any(True for _ in chain.stem.parameters()) else 1
    blocks: list[Any] = list(chain.blocks)
    return tuple(len(block.convs) if i >= first else 0 for i, block in enumerate(blocks))


def edge_blocks(convs: Sequence[int], count: int) -> int:
    """The number of blocks that hold the first ``count`` convolutions.

    Args:
        convs: of each block, from ``quantizable``.

    Raises:
        ValueError: more than there are, or a number in the middle of a block.
    """
    if type(count) is not int or not 0 <= count <= sum(convs):
        raise ValueError(
            f"Expected precision.edge_convs to be a whole number from 0 to {sum(convs)}, the convolutions of this "
            f"backbone's blocks, got {count}."
        )
    ends = list(accumulate(convs, initial=0))
    if count not in ends:
        below, above = max(e for e in ends if e < count), min(e for e in ends if e > count)
        raise ValueError(
            f"precision.edge_convs={count} ends in the middle of a block; choose {below} or {above}, where blocks end."
        )
    return ends.index(count)


def quantized(chain: Chain, weight_bits: int, act_bits: int, count: int) -> Chain:
    """The chain with the first ``count`` convolutions of its blocks in few bits, its other parts shared.

    The last of these blocks closes them: without, the sum that the shortcuts carry reaches the rest of the network as
    it is, and training at the papers' rate of 0.1 blows it up.

    Args:
        weight_bits, act_bits: 1 to 8, or 32; with 32 and 32 too, the blocks are pre-activation blocks.
        count: precision.edge_convs.

    Raises:
        ValueError: other bits, or a count that does not end with a block.
    """
    check_bits("precision.weight_bits", weight_bits)
    check_bits("precision.act_bits", act_bits)
    convs = quantizable(chain)
    blocks: list[Block] = []
    edge = edge_blocks(convs, count)
    for i, (block, own) in enumerate(zip(chain.blocks[:edge], convs, strict=False), start=1):
        assert isinstance(block, Block)
        blocks.append(block.quantized(weight_bits, act_bits, closes=i == edge) if own else block)
    rest: list[Any] = list(chain.blocks)[len(blocks) :]
    parts = (chain.stem, [*blocks, *rest], chain.head)
    return Chain(*parts, chain.stage_lengths, chain.input_shape, chain.num_classes)


@dataclass(frozen=True)
class AlongEdge:
    """Exits evenly along the first ``edge_convs`` convolutions of the blocks, the last at their end.

    The others follow the blocks whose ends come nearest. Section III-B of the hybrid-network paper has one, or two.

    Args:
        exits: how many.
        edge_convs: how many convolutions are the edge's, None for a share of them.
        share: from above 0 to 1; the edge ends with the block whose end comes nearest.

    Raises:
        ValueError: on use, values outside their range, or an edge that does not end with a block.
    """

    exits: int = 1
    edge_convs: int | None = None
    share: float = 2 / 3

    def __call__(
        self, stage_lengths: Sequence[int], tap_macs: Sequence[float], convs: Sequence[int]
    ) -> tuple[int, ...]:
        if type(self.exits) is not int or self.exits < 1:
            raise ValueError(f"Expected method.exits.exits to be a whole number of at least 1, got {self.exits}.")
        if self.edge_convs is None and not 0 < self.share <= 1:
            raise ValueError(f"Expected method.exits.share from above 0 to 1, got {self.share}.")
        ends = list(accumulate(convs))
        if not any(convs):
            raise ValueError("method/exits=edge needs a backbone with convolutions that can be quantized, got none.")
        count = self.share * ends[-1] if self.edge_convs is None else self.edge_convs
        if self.edge_convs is not None and edge_blocks(convs, self.edge_convs) == 0:
            raise ValueError("method/exits=edge needs precision.edge_convs above 0: the exit is at the edge's end.")
        places = [count * (i + 1) / self.exits for i in range(self.exits)]
        inner = [k for k, end in enumerate(ends) if end]
        nearest = {min(inner, key=lambda k: (abs(ends[k] - place), k)) + 1 for place in places}
        if len(nearest) < self.exits:
            raise ValueError(
                f"Expected room for method.exits.exits={self.exits} along {count:g} convolutions, got {len(nearest)} "
                "blocks that exits could follow evenly; choose fewer exits or more convolutions."
            )
        return tuple(sorted(nearest))
