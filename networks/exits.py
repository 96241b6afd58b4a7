"""The rules that place early exits along a chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# (blocks in each stage, MACs from the image up to each tap from 1 on, convolutions of each block that can be quantized)
# -> the taps, rising
Places = Callable[[Sequence[int], Sequence[float], Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True)
class StageFractions:
    """Exits at fractions of the stages: after block ⌈f·n⌉ of a stage of n blocks; 0 is its first block.

    A place after the last block of all is left out: the backbone's own head is there.

    Args:
        fractions: each from 0 to 1.
        stages: the stages that get exits, counted from 1; None for all.

    Raises:
        ValueError: on use, a fraction outside 0 to 1 or a stage the chain has not.
    """

    fractions: Sequence[float]
    stages: Sequence[int] | None = None

    def __call__(
        self, stage_lengths: Sequence[int], tap_macs: Sequence[float], convs: Sequence[int] = ()
    ) -> tuple[int, ...]:
        _require_fractions(self.fractions)
        stages = range(1, len(stage_lengths) + 1) if self.stages is None else self.stages
        taps = set()
        for stage in stages:
            if not 1 <= stage <= len(stage_lengths):
                raise ValueError(f"Expected stages from 1 to {len(stage_lengths)}, got {stage}.")
            before, n = sum(stage_lengths[: stage - 1]), stage_lengths[stage - 1]
            # rounded first: 0.07 * 100 is a little more than 7 in floating point
            taps |= {before + max(1, math.ceil(round(f * n, 9))) for f in self.fractions}
        return tuple(sorted(taps - {sum(stage_lengths)}))


@dataclass(frozen=True)
class MacFractions:
    """Exits where the backbone's MACs come nearest to fractions of its whole, never after the last block.

    Args:
        fractions: each from 0 to 1.

    Raises:
        ValueError: on use, a fraction outside 0 to 1.
    """

    fractions: Sequence[float]

    def __call__(
        self, stage_lengths: Sequence[int], tap_macs: Sequence[float], convs: Sequence[int] = ()
    ) -> tuple[int, ...]:
        _require_fractions(self.fractions)
        inner = range(1, len(tap_macs))
        if not inner:
            return ()
        return tuple(
            sorted({min(inner, key=lambda k: abs(tap_macs[k - 1] - f * tap_macs[-1])) for f in self.fractions})
        )


@dataclass(frozen=True)
class Blocks:
    """Exits after the blocks of these numbers, counted from 1; an empty list for no early exit.

    Raises:
        ValueError: on use, a number twice or outside the chain.
    """

    taps: Sequence[int] = ()

    def __call__(
        self, stage_lengths: Sequence[int], tap_macs: Sequence[float], convs: Sequence[int] = ()
    ) -> tuple[int, ...]:
        return checked_taps(self.taps, sum(stage_lengths))


def checked_taps(taps: Sequence[int], blocks: int) -> tuple[int, ...]:
    """The taps in rising order.

    Raises:
        ValueError: a tap twice, or outside 1 to ``blocks``.
    """
    outside = [tap for tap in taps if not 1 <= tap <= blocks]
    if outside:
        raise ValueError(f"Expected taps from 1 to {blocks}, the number of blocks of the backbone, got {outside[0]}.")
    if len(set(taps)) < len(taps):
        raise ValueError(f"Expected every tap once, got {list(taps)}.")
    return tuple(sorted(taps))


def _require_fractions(fractions: Sequence[float]) -> None:
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ValueError(f"Expected fractions from 0 to 1, got {fraction}.")
